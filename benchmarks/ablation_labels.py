"""The ablations' labels: images are drawn once, answers and attention computed once, and label maps made from them.

images -> questions.jsonl -> own answers, their attention (slow, once) -> ternary labels
                                                                       -> other labels from the stored attention
                          -> known answers, their attention (once)     -> ternary labels
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qzoom.errors import DataError
from qzoom.labels.maps import IGNORE
from qzoom.labels.settings import LabelMapSettings
from qzoom.store.log import atomic_path
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Attention, Question, RegionLabel, content_id

if TYPE_CHECKING:
    from qzoom.engine.state import Engine
    from qzoom.labels.find_heads import HeadSet
    from qzoom.labels.settings import RegionRecipe

PURPOSE = "regions"
Change = Callable[[Question, RegionLabel, np.ndarray, np.ndarray], tuple[RegionLabel, np.ndarray]]
"""From a question, its label, the grounding and the sink map to another label with its cells."""


def draw_questions(
    folder: Path, counts: Mapping[str, int], per_picture: int, first: int, check: Callable[[], None]
) -> Path:
    """Draw pictures into a folder, with a question file beside them; what is there is kept.

    All questions are of mode "text": the embedded model was never asked for a box in words.

    Args:
        folder: to fill.
        counts: how many documents and scenes.
        per_picture: most questions about each.
        first: seed of the first picture, of those that training may use.
        check: called between pictures.
    """
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.scenes import render_scene

    target = folder / "questions.jsonl"
    wanted = {"counts": dict(counts), "per_picture": per_picture, "first": first}
    note = folder / "questions.json"
    if target.exists() and note.exists() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return target
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for kind, count in counts.items():
        for seed in range(first, first + count):
            check()
            drawn = (render_document if kind == "documents" else render_scene)(seed)
            path = folder / "images" / f"{kind}-{seed}.png"
            if not path.exists():
                with atomic_path(path) as partial:
                    drawn.image.save(partial, "PNG", compress_level=1)
            chooser = random.Random(f"{first}/{kind}/{seed}")
            asked = chooser.sample(drawn.questions, min(per_picture, len(drawn.questions)))
            turns = [
                {"question": q.question, "answer": q.answer, "boxes": [list(box) for box in q.boxes]} for q in asked
            ]
            lines.append({"id": path.stem, "image": f"images/{path.name}", "turns": turns, "source": kind})
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    note.write_text(json.dumps(wanted), encoding="utf-8")
    return target


def changed_labels(source: Path, folder: Path, name: str, change: Change) -> Path:
    """Other labels from kept attention, as a store of their own; one that is finished is kept.

    Args:
        source: store of the own answers' labels.
        folder: to fill.
        name: of the change, noted in the store.
        change: makes the other label.
    """
    store = RecordStore(source)
    start_store(folder, PURPOSE, store.settings | {"change": name}, store.provenance)
    with RecordWriter(folder) as writer:
        for sample in store.samples:
            if sample not in writer.done:
                writer.append(sample, _changed(store, sample, change))
    return folder


def _changed(store: RecordStore, sample: str, change: Change) -> list[tuple[Any, dict[str, np.ndarray]]]:
    found = [store.get(record_id) for record_id in store.samples[sample]]
    questions = [stored.record for stored in found if isinstance(stored.record, Question)]
    maps = {stored.id: stored for stored in found if isinstance(stored.record, Attention)}
    out: list[tuple[Any, dict[str, np.ndarray]]] = [(questions[0], {})]
    for stored in found:
        label = stored.record
        if isinstance(label, RegionLabel):
            seen = maps[label.attention]
            grounding, sink = (store.tensor(seen, key) for key in ("grounding", "sink"))
            other, labels = change(questions[0], label, grounding, sink)
            out.append((other, {"labels": labels}))
    return out


def relabelled(settings: LabelMapSettings, *, sinks: bool = True, two_state: bool = False) -> Change:
    """Label the kept maps with other thresholds.

    Args:
        settings: thresholds.
        sinks: take sink cells out of the map.
        two_state: what is not foreground is background; nothing is left open.
    """
    from qzoom.labels.maps import label_record, region_labels

    def change(
        question: Question, label: RegionLabel, grounding: np.ndarray, sink: np.ndarray
    ) -> tuple[RegionLabel, np.ndarray]:
        turn = question.turns[label.turn]
        made, labels = label_record(
            region_labels(
                sink if sinks else np.zeros_like(sink),
                grounding,
                settings,
                padded_from_px=label.size_px if label.view == "square" else None,
            ),
            view=label.view,
            map_view=label.view,
            size_px=label.size_px,
            boxes=turn.boxes,
            **{key: getattr(label, key) for key in ("question", "turn", "response", "text", "prompt")},
            attention="",
        )
        if two_state and made.usable:
            labels = np.where(labels == IGNORE, 0, labels).astype(np.int8)
            made = dataclasses.replace(made, valid=int(labels.size))
        return made, labels

    return change


def from_boxes(
    question: Question, label: RegionLabel, grounding: np.ndarray, sink: np.ndarray
) -> tuple[RegionLabel, np.ndarray]:
    """Label from the known answer boxes of the turn."""
    from qzoom.labels.maps import box_labels, label_record

    rows, columns = grounding.shape
    facts = {key: getattr(label, key) for key in ("question", "turn", "text", "prompt")}
    label_map = box_labels(question.turns[label.turn].boxes, label.size_px, (rows, columns), label.view)
    made, labels = label_record(
        label_map,
        view=label.view,
        map_view=label.view,
        size_px=label.size_px,
        boxes=(),
        response="",
        attention="",
        **facts,
    )
    return dataclasses.replace(made, agrees=made.usable or None), labels


def some_labels(source: Path, folder: Path, maps: int) -> Path:
    """The first samples of a store until there are so many usable maps, in an order of their own."""
    store = RecordStore(source)
    order = list(store.samples)
    random.Random(0).shuffle(order)
    start_store(folder, PURPOSE, store.settings | {"change": f"{maps} maps"}, store.provenance)
    count = 0
    with RecordWriter(folder) as writer:
        for sample in order:
            if count >= maps:
                break
            found = [store.get(record_id) for record_id in store.samples[sample]]
            count += sum(isinstance(stored.record, RegionLabel) and stored.record.usable for stored in found)
            if sample not in writer.done:
                tensors = [{name: store.tensor(stored, name) for name in stored.digests} for stored in found]
                writer.append(sample, [(s.record, held) for s, held in zip(found, tensors, strict=True)])
    if count < maps:
        raise DataError(f"{source} has {count} usable maps, fewer than {maps}; label more pictures.")
    return folder


def known_answers(
    engine: Engine,
    recipe: RegionRecipe,
    questions: Sequence[Question],
    source: Path,
    folder: Path,
    *,
    heads: Mapping[str, HeadSet],
    check: Callable[[], None],
) -> Path:
    """Labels from the attention of the known answers, read to the model as if it had given them.

    Args:
        engine: the model.
        recipe: what decides the labels.
        questions: all of them.
        source: store of the own answers' labels, for settings and provenance.
        folder: to fill; what is there is kept.
        heads: whose attention, per mode.
        check: called between questions.
    """
    from qzoom.engine.chat import ChatEncoder
    from qzoom.labels.workers import sample_key

    store = RecordStore(source)
    start_store(folder, PURPOSE, store.settings | {"change": "known answers"}, store.provenance)
    depth = min(recipe.sink_layers, engine.backbone.num_layers - 1)
    made = dataclasses.replace(engine, gate=None, region=None, config=engine.config.replace(shared_layers=depth))
    chat = ChatEncoder(engine.backbone)
    with RecordWriter(folder) as writer:
        for question in questions:
            if sample_key(question) not in writer.done:
                writer.append(sample_key(question), _known(made, chat, recipe, heads[question.mode], question))
            check()
    return folder


def _known(
    engine: Engine, chat: Any, recipe: RegionRecipe, heads: HeadSet, question: Question
) -> list[tuple[Any, dict[str, np.ndarray]]]:
    from qzoom.data.questions import load_picture
    from qzoom.labels.maps import label_record, region_labels
    from qzoom.labels.respond import attention_of, generate, prepare_image, sink_cells

    image = prepare_image(load_picture(question), recipe.view, recipe.tokens)
    responses = generate(engine, chat, image, [turn.question for turn in question.turns], max_new_tokens=1)
    tokenizer = engine.backbone.tokenizer
    texts = [turn.answers[0] for turn in question.turns]
    tokens = [(*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id) for text in texts]
    responses = dataclasses.replace(responses, texts=tuple(texts), tokens=tuple(tokens))
    layers = sorted({layer for layer, _ in heads.pointing})
    out: list[tuple[Any, dict[str, np.ndarray]]] = [(question, {})]
    for index, turn in enumerate(question.turns):
        attention = attention_of(engine, responses, index, layers)
        if attention is None:
            continue
        state = responses.states[index]
        sinks = sink_cells(state.hidden, state.prompt.spans[0], recipe.sink_ratio).cpu().numpy().astype(np.float32)
        label, labels = label_record(
            region_labels(
                sinks,
                attention.mean_of(heads.pointing).cpu().numpy().astype(np.float32),
                recipe.maps,
                padded_from_px=image.size_px if recipe.view == "square" else None,
            ),
            view=recipe.view,
            map_view=recipe.view,
            size_px=image.size_px,
            boxes=turn.boxes,
            question=content_id(question),
            turn=index,
            response="",
            attention="",
            text=texts[index],
            prompt=turn.question,
        )
        out.append((label, {"labels": labels}))
    return out


def label_facts(folder: Path) -> dict[str, Any]:
    """What a store of labels came to: usable maps, their agreement with known boxes, and the share of sink cells."""
    from qzoom.labels.label_regions import region_report

    store, found = RecordStore(folder), region_report(folder)
    cells = sinks = 0
    for stored, _ in store.of_kind(Attention):
        sink = store.tensor(stored, "sink")
        cells, sinks = cells + sink.size, sinks + int((sink >= 0.5).sum())
    facts: dict[str, Any] = {"maps": found.maps, "usable": found.usable, "agreement": found.agreement}
    return facts | ({"sinks": sinks / cells} if cells else {})
