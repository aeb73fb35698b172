"""Stage 1, first half: label maps from the attention of the model's own answers, or from known answer boxes.

Every image is one sample of the store: the question, and for each of its turns the response, its attention maps and the
label map (docs/method.md 5). A turn or image that cannot be used gets a record with the reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qzoom.checkpoints.weights import base_digest
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError, LaterError, QZoomError
from qzoom.labels.find_heads import HeadSet, Mode, choose_heads
from qzoom.labels.maps import box_labels, label_record, region_labels
from qzoom.labels.respond import PreparedImage, Responses, attention_of, generate, prepare_image, sink_cells
from qzoom.labels.settings import LabelMapSettings, RegionRecipe
from qzoom.labels.workers import Labeller, LabelRecords, LabelRun, fill_store, open_store, read_picture
from qzoom.settings import from_mapping, to_dict
from qzoom.store.log import write_atomic
from qzoom.store.records import RecordStore, Stored, StoreLock
from qzoom.store.schema import Attention, Question, RegionLabel, Response, Skip, content_id, from_values, tensor_digest

Heads = Mapping[Mode, HeadSet]


@dataclass(frozen=True, slots=True)
class RegionReport:
    """Figures of a store of region labels."""

    questions: int  # pictures with questions, done
    maps: int  # label maps
    usable: int  # maps with something to learn from
    too_weak: int  # maps that are not usable because their maximum is below `maps.min_peak`, or without answer boxes
    # maps that are not usable because the box around the foreground is too large (`maps.ignore_share`; half of the map
    # for labels from boxes)
    too_large: int
    skipped: int  # questions or turns left out
    reasons: tuple[str, ...]  # the first few reasons
    # share of usable maps from attention with a foreground cell on a known answer box; None where no box is known
    agreement: float | None
    unread: int = 0  # questions that are left for a later run, since their picture could not be read
    unread_reason: str = ""  # of the first of them


def label_regions(run: LabelRun, questions: Sequence[Question], recipe: RegionRecipe) -> RegionReport:
    """Label questions; a rerun resumes (ConfigError: heads that the model does not have, or records in the folder that
    were made in another way; DataError: a worker died, or the disk refuses)."""
    engine = run.model.load()
    if recipe.view == "square" and engine.backbone.square_padding is not None:
        raise ConfigError("This model pads every picture to a square itself; leave view at dynamic.")
    about: dict[str, Any] = {
        "purpose": "regions",
        "sizes": {"tokens": recipe.tokens, "view": recipe.view, "max_new_tokens": recipe.max_new_tokens},
        "prompt": "question, or question and request for a box",
    }
    settings = to_dict(recipe)
    with StoreLock(run.folder) as lock:
        if recipe.source != "boxes" and _continues(run):
            # another run's records are refused before the heads are searched for, which takes minutes
            earlier = RecordStore(run.folder).settings.get("heads", {})
            open_store(run, engine, settings=settings | {"heads": earlier}, **about)
        heads: Heads = {} if recipe.source == "boxes" else _heads_of(run, engine, questions, recipe)
        unread = fill_store(
            run,
            engine,
            questions,
            partial(region_labeller, recipe=recipe, heads=heads, images=run.images),
            settings=settings | {"heads": {mode: asdict(chosen) for mode, chosen in heads.items()}},
            lock=lock,
            **about,
        )
    return dataclasses.replace(region_report(run.folder), unread=len(unread), unread_reason="".join(unread[:1]))


def region_report(folder: Path) -> RegionReport:
    """Figures of a store of region labels."""
    store = RecordStore(folder)
    labels = [label for _, label in store.of_kind(RegionLabel)]
    weak = [_is_weak(store, stored, label) for stored, label in store.of_kind(RegionLabel) if not label.usable]
    reasons = [skip.reason for _, skip in store.of_kind(Skip)]
    agreeing = [label.agrees for label in labels if label.agrees is not None]
    return RegionReport(
        questions=len(store.samples),
        maps=len(labels),
        usable=sum(label.usable for label in labels),
        too_weak=sum(weak),
        too_large=len(weak) - sum(weak),
        skipped=len(reasons),
        reasons=tuple(reasons[:5]),
        agreement=sum(agreeing) / len(agreeing) if agreeing else None,
    )


def _is_weak(store: RecordStore, stored: Stored, label: RegionLabel) -> bool:
    """Whether an unusable map has too low a maximum; its box is too large otherwise."""
    settings = from_mapping(LabelMapSettings, store.settings.get("maps", {}), f"{store.folder}: maps")
    x0, y0, x1, y1 = label.box
    share = settings.ignore_share if label.attention else 0.5
    if (x1 - x0) * (y1 - y0) < share * store.tensor(stored, "labels").size:
        return True
    if not label.attention:
        return False
    attention = store.get(label.attention)
    sinks = store.tensor(attention, "sink") >= settings.sink_threshold
    return float(np.where(sinks, 0.0, store.tensor(attention, "grounding")).max()) < settings.min_peak


def box_prompt(question: str) -> str:
    """The question with a request for the region, which turns the attention of the answer spatial (method.md 5.1)."""
    return (
        f"{question.strip()} Give the bounding box of the part of the picture that shows the answer, as plain text on "
        "one line: left, top, right, bottom, and a short label."
    )


def region_labeller(engine: Engine, *, recipe: RegionRecipe, heads: Heads, images: str = "") -> Labeller:
    """The function that labels one question by the attention of the mode's heads, or from boxes."""
    depth = min(recipe.sink_layers, engine.backbone.num_layers - 1)
    plain = dataclasses.replace(engine, gate=None, region=None, config=engine.config.replace(shared_layers=depth))
    chat = ChatEncoder(engine.backbone)

    def label(question: Question) -> LabelRecords:
        try:
            picture = read_picture(question, images)
            image = prepare_image(picture, recipe.view, recipe.tokens)
            if recipe.source == "boxes":
                return [(question, {}), *_from_boxes(plain, question, image)]
            spatial = question.mode == "natural" and recipe.box_prompt
            prompts = [box_prompt(turn.question) if spatial else turn.question for turn in question.turns]
            responses = generate(plain, chat, image, prompts, max_new_tokens=recipe.max_new_tokens)
            records: LabelRecords = [(question, {})]
            for index in range(len(question.turns)):
                records += _from_answer(
                    plain,
                    recipe,
                    heads[question.mode],
                    responses,
                    question=question,
                    index=index,
                    image=image,
                    prompt=prompts[index],
                )
            return records
        except LaterError:
            raise
        except QZoomError as error:
            return [(question, {}), (Skip(content_id(question), str(error)), {})]

    return label


def _from_boxes(engine: Engine, question: Question, image: PreparedImage) -> LabelRecords:
    """Label maps of all turns from their known answer boxes."""
    question_id = content_id(question)
    grid, view = engine.backbone.grid(image.picture.size_px, image.budget), engine.backbone.map_view(image.view)
    records: LabelRecords = []
    for index, turn in enumerate(question.turns):
        if not turn.boxes:
            records.append((Skip(question_id, f"Turn {index + 1} has no answer boxes, which --from boxes needs."), {}))
            continue
        label, labels = label_record(
            box_labels(turn.boxes, image.size_px, grid, view),
            view=image.view,
            map_view=view,
            size_px=image.size_px,
            boxes=(),
            question=question_id,
            turn=index,
            response="",
            attention="",
            text=turn.answers[0] if turn.answers else "",
            prompt=turn.question,
        )
        records.append((label, {"labels": labels}))
    return records


def _from_answer(
    engine: Engine,
    recipe: RegionRecipe,
    heads: HeadSet,
    responses: Responses,
    *,
    question: Question,
    index: int,
    image: PreparedImage,
    prompt: str,
) -> LabelRecords:
    """Response, attention and label map of one turn."""
    by_heads = recipe.sink_by == "heads" and bool(heads.sinks)
    layers = sorted({layer for layer, _ in (*heads.pointing, *(heads.sinks if by_heads else ()))})
    turn, state, text = question.turns[index], responses.states[index], responses.texts[index]
    span, size_px, question_id = state.prompt.spans[0], image.size_px, content_id(question)
    tokens, shown_px = responses.tokens[index], image.picture.size_px
    response = Response(question_id, index, prompt, text, tokens, shown_px, span.features.grid, recipe.view)
    attention = attention_of(engine, responses, index, layers)
    if attention is None:
        reason = f"Turn {index + 1}: the model gave no answer, so there is no attention to take."
        return [(response, {}), (Skip(question_id, reason), {})]
    grounding = attention.mean_of(heads.pointing).cpu().numpy().astype(np.float32)
    if by_heads:
        sink = attention.mean_of(heads.sinks).cpu().numpy().astype(np.float32)
    elif recipe.sink_by == "norm":
        sink = sink_cells(state.hidden, span, recipe.sink_ratio).cpu().numpy().astype(np.float32)
    else:
        sink = np.zeros_like(grounding)
    sink_by: Literal["norm", "heads", "none"] = "heads" if by_heads else "norm" if recipe.sink_by == "norm" else "none"
    maps = {"grounding": grounding, "sink": sink}
    source = Attention(content_id(response), heads.pointing, sink_by, heads.sinks if by_heads else ())
    label, labels = label_record(
        region_labels(sink, grounding, recipe.maps, padded_from_px=size_px if recipe.view == "square" else None),
        view=recipe.view,
        map_view=engine.backbone.map_view(recipe.view),
        size_px=size_px,
        boxes=turn.boxes,
        question=question_id,
        turn=index,
        response=content_id(response),
        attention=content_id(source, {name: tensor_digest(array) for name, array in maps.items()}),
        text=text,
        prompt=turn.question,
    )
    return [(response, {}), (source, maps), (label, {"labels": labels})]


def _continues(run: LabelRun) -> bool:
    """Whether the folder has records, which the run is to add to."""
    return not run.fresh and any(run.folder.glob("records-*.jsonl"))


def _heads_of(run: LabelRun, engine: Engine, questions: Sequence[Question], recipe: RegionRecipe) -> Heads:
    """The heads that an earlier run with this model and recipe stored, since a search takes minutes; else new ones."""
    path = run.folder / "heads.json"
    modes: list[Mode] = sorted({question.mode for question in questions})
    names = ("heads", "sink_heads", "tokens", "view", "max_new_tokens", "search")
    settings = {name: value for name, value in to_dict(recipe).items() if name in names}
    identity = {"modes": list(modes), "settings": settings, "weights": base_digest(engine)}
    stored = None if run.fresh else _stored_heads(path, identity)
    if stored is not None:
        return stored
    if recipe.heads == "auto" and path.is_file() and _continues(run):
        raise ConfigError(
            f"{run.folder} has records by heads that were chosen in another way ({path.name}); use --fresh to replace "
            "the records, or another folder."
        )
    chosen, facts = choose_heads(engine, modes, recipe)
    run.folder.mkdir(parents=True, exist_ok=True)
    values = {"identity": identity, "heads": {mode: asdict(heads) for mode, heads in chosen.items()}, "found": facts}
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
    return chosen


def _stored_heads(path: Path, identity: dict[str, Any]) -> Heads | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["identity"] != json.loads(json.dumps(identity)):
            return None
        return {mode: from_values(HeadSet, heads, str(path)) for mode, heads in values["heads"].items()}
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
