"""`qzoom label regions` without the command line: find heads, open the store, label in one or more processes.

Stage 1, first half: label a set of questions with the attention of the model's own answers (method.md 5.1 to 5.3).

Every picture is one sample of the store: the question, and for each of its turns the response, its attention maps and
the tri-state labels. A sample that cannot be used leaves a record that says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qzoom.data.questions import load_picture
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, QZoomError
from qzoom.labels.attention import sink_cells
from qzoom.labels.find_heads import HeadSearch, HeadSet, Mode, find_heads, parse_heads, published_heads
from qzoom.labels.maps import RegionLabelSettings, label_record
from qzoom.labels.respond import Responses, Shown, View, attention_of, respond, show
from qzoom.labels.workers import ModelChoice, run_shares
from qzoom.store.log import write_atomic
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import (
    Attention,
    Provenance,
    Question,
    Record,
    RegionLabel,
    Response,
    Skip,
    Turn,
    content_id,
    tensor_digest,
)

if TYPE_CHECKING:
    from qzoom.engine.state import Engine

__all__ = [
    "LabelRegions",
    "LabelReport",
    "RegionRun",
    "ask_for_box",
    "base_digest",
    "choose_heads",
    "label_questions",
    "label_regions",
    "report_of",
    "sample_of",
]


@dataclass(frozen=True, slots=True)
class LabelRegions:
    """The job of one process."""

    run: RegionRun

    def __call__(
        self, engine: Engine, questions: Sequence[Question], folder: Path, number: int, on_question: Callable[[], None]
    ) -> None:
        """Label a share."""
        label_questions(engine, self.run, questions, folder, number=number, on_question=on_question)


def base_digest(engine: Engine) -> str:
    """Digest of the base model's weights alone, whatever number format they were loaded in: what labels belong to.

    LoRA weights count as such, since their sum with the base's depends on the format that it is rounded to.
    """
    import torch

    lora = engine.backbone.lora
    merged = () if lora is None else tuple(f".{target}.weight" for target in lora.targets)
    digest = hashlib.sha256(b"" if lora is None else lora.digest.encode())
    for name, tensor in sorted(engine.backbone.model.state_dict().items()):
        if name.endswith(merged) and "visual" not in name:
            continue
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 512)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def choose_heads(
    engine: Engine, how: str, modes: Sequence[Mode], search: HeadSearch, sinks: str = ""
) -> tuple[dict[Mode, HeadSet], dict[str, Any]]:
    """Heads for the modes that occur.

    Args:
        engine: the model.
        how: "auto" (find them), "preset" (the authors' tables), or heads as "22:1,4 23:6,11".
        modes: those that occur.
        search: how to find them.
        sinks: sink heads, written likewise; "" takes the preset's, else none.

    Returns:
        The heads, and what was found out, as JSON values.

    Raises:
        ConfigError: heads that the model does not have, or no preset for it.
    """
    backbone = engine.backbone
    own = parse_heads(sinks) if sinks else ()
    chosen: dict[Mode, HeadSet] = {}
    facts: dict[str, Any] = {}
    for mode in modes:
        if how == "auto":
            found = find_heads(engine, mode, search)
            chosen[mode] = dataclasses.replace(found.heads, sinks=own)
            facts[mode] = {"samples": found.samples, "scores": [asdict(score) for score in found.scores]}
        elif how == "preset":
            preset = published_heads(backbone.family, backbone.hidden_size, backbone.num_layers, mode)
            if preset is None:
                raise ConfigError(
                    f"There is no table of heads for a {backbone.family} of {backbone.num_layers} layers and width "
                    f"{backbone.hidden_size}; use --heads auto, or name them."
                )
            chosen[mode] = HeadSet(preset.pointing, own or preset.sinks)
        else:
            chosen[mode] = HeadSet(parse_heads(how), own)
        _check_heads(engine, chosen[mode])
    return chosen, facts


def label_regions(
    choice: ModelChoice,
    questions: Sequence[Question],
    folder: Path,
    run: RegionRun,
    *,
    heads: str = "auto",
    sinks: str = "",
    search: HeadSearch | None = None,
    seed: int = 0,
    processes: int = 1,
    fresh: bool = False,
    on_question: Callable[[int], None] = lambda _: None,
) -> LabelReport:
    """Label questions; a rerun continues.

    Args:
        choice: the model.
        questions: what to label.
        folder: the store to fill.
        run: how; its heads are replaced by the chosen ones.
        heads: see `choose_heads`.
        sinks: likewise.
        search: how heads are found; None uses the run's look.
        seed: noted in the records.
        processes: how many label at once.
        fresh: start over.
        on_question: called with the number of questions done since the last call.

    Raises:
        ConfigError: the folder's records were made in another way.
        DataError: a process died, or the disk refuses.
    """
    engine = choice.load()
    modes: list[Mode] = sorted({question.mode for question in questions})
    looked = search or HeadSearch(tokens=run.tokens, view=run.view, max_new_tokens=min(32, run.max_new_tokens))
    weights = base_digest(engine)
    asked = {"heads": heads, "sinks": sinks, "modes": list(modes), "search": asdict(looked)}
    chosen = _kept_heads(engine, folder, {"asked": asked, "weights": weights}, modes, looked, fresh)
    run = dataclasses.replace(run, heads=chosen)
    config = engine.backbone.model.config
    provenance = Provenance(
        model=choice.name,
        weights=weights,
        revision=getattr(config, "_commit_hash", None) or choice.revision,
        prompt="question, or question and request for a box",
        seed=seed,
        sizes={"tokens": run.tokens, "view": run.view, "max_new_tokens": run.max_new_tokens},
    )
    start_store(folder, "regions", run.settings(), provenance, fresh=fresh)
    share = engine if processes == 1 else None
    run_shares(LabelRegions(run), choice, share, questions, folder, processes=processes, on_question=on_question)
    return report_of(folder)


def _kept_heads(
    engine: Engine,
    folder: Path,
    identity: dict[str, Any],
    modes: Sequence[Mode],
    search: HeadSearch,
    fresh: bool,
) -> dict[Mode, HeadSet]:
    """The heads that an earlier call found with the same model and wish, since finding them takes minutes; else new."""
    path = folder / "heads.json"
    kept = None if fresh else _found_before(path, identity)
    if kept is not None:
        return kept
    asked = identity["asked"]
    chosen, facts = choose_heads(engine, asked["heads"], modes, search, asked["sinks"])
    folder.mkdir(parents=True, exist_ok=True)
    found = {"identity": identity, "heads": {mode: asdict(heads) for mode, heads in chosen.items()}, "found": facts}
    write_atomic(path, (json.dumps(found, indent=2) + "\n").encode())
    return chosen


def _check_heads(engine: Engine, heads: HeadSet) -> None:
    layers, count = engine.backbone.num_layers, int(engine.backbone.text_config.num_attention_heads)
    for layer, head in (*heads.pointing, *heads.sinks):
        if layer >= layers or head >= count:
            raise ConfigError(f"Head {layer}:{head} does not exist; the model has {layers} layers of {count} heads.")


def _found_before(path: Path, identity: dict[str, Any]) -> dict[Mode, HeadSet] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] != json.loads(json.dumps(identity)):
            return None
        return {
            mode: HeadSet(_pairs(value["pointing"]), _pairs(value["sinks"])) for mode, value in kept["heads"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(head)) for layer, head in values)


Sample = list[tuple[Record, Mapping[str, np.ndarray]]]


@dataclass(frozen=True, slots=True)
class RegionRun:
    """Everything that decides the labels.

    Args:
        heads: per mode, whose attention.
        view: "square" (the release: padded with grey, exactly `tokens`) or "dynamic" (as it is, at most `tokens`).
        tokens: visual tokens of the look.
        max_new_tokens: longest answer.
        sink_by: "norm" of the hidden state, "heads" (where the mode's heads have sink heads, else none), or "none".
        sink_ratio: with "norm", how many medians a norm must exceed.
        sink_layers: with "norm", after how many layers the hidden states are taken.
        box_prompt: natural pictures are asked for the box of the region too.
        tristate: thresholds of the labels.
        images: folder of the pictures, when they have moved; "" takes the records' own.
    """

    heads: dict[Mode, HeadSet]
    view: View = "dynamic"
    tokens: int = 576
    max_new_tokens: int = 128
    sink_by: Literal["norm", "heads", "none"] = "norm"
    sink_ratio: float = 3.0
    sink_layers: int = 3
    box_prompt: bool = True
    tristate: RegionLabelSettings = field(default_factory=RegionLabelSettings)
    images: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "max_new_tokens", "sink_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.view == "square" and int(self.tokens**0.5) ** 2 != self.tokens:
            raise ConfigError(f"A square look needs a square number of tokens such as 576, not {self.tokens}.")

    def settings(self) -> dict[str, Any]:
        """As JSON values, without what may change between reruns."""
        values = asdict(self)
        del values["images"]
        return values


@dataclass(frozen=True, slots=True)
class LabelReport:
    """What labelling came to.

    Args:
        questions: pictures with questions, done.
        maps: label maps.
        usable: maps with something to learn from.
        skipped: questions left out.
        reasons: the first few reasons.
        agreement: share of usable maps with a foreground cell on a known answer box; None where no box is known.
    """

    questions: int
    maps: int
    usable: int
    skipped: int
    reasons: tuple[str, ...]
    agreement: float | None


def ask_for_box(question: str) -> str:
    """The question with a request for the region, which turns the attention of the answer spatial (method.md 5.1)."""
    return (
        f"{question.strip()} Give the bounding box of the part of the picture that shows the answer, as plain text on "
        "one line: left, top, right, bottom, and a short label."
    )


def sample_of(question: Question) -> str:
    """The key of a question's sample."""
    return f"{question.source}/{question.name}/{content_id(question)}"


def label_questions(
    engine: Engine,
    run: RegionRun,
    questions: Sequence[Question],
    folder: Path,
    *,
    number: int = 0,
    on_question: Callable[[], None] = lambda: None,
) -> None:
    """Label the questions that the store does not have yet.

    Args:
        engine: the model.
        run: how.
        questions: this process's share.
        folder: a store made by `start_store`.
        number: of this writer.
        on_question: called after each one.
    """
    made = dataclasses.replace(
        engine,
        gate=None,
        region=None,
        config=engine.config.replace(shared_layers=min(run.sink_layers, engine.backbone.num_layers - 1)),
    )
    chat = ChatEncoder(engine.backbone)
    with RecordWriter(folder, number) as writer:
        for question in questions:
            sample = sample_of(question)
            if sample not in writer.done:
                writer.append(sample, _labelled(made, chat, run, question))
            on_question()


def report_of(folder: Path) -> LabelReport:
    """Figures of a store of region labels."""
    store = RecordStore(folder)
    labels = [label for _, label in store.of_kind(RegionLabel)]
    skips = [skip.reason for _, skip in store.of_kind(Skip)]
    known = [label.agrees for label in labels if label.agrees is not None]
    return LabelReport(
        questions=len(store.samples),
        maps=len(labels),
        usable=sum(label.usable for label in labels),
        skipped=len(skips),
        reasons=tuple(skips[:5]),
        agreement=sum(known) / len(known) if known else None,
    )


def _labelled(engine: Engine, chat: ChatEncoder, run: RegionRun, question: Question) -> Sample:
    """All records of a question, or one that says why there are none."""
    try:
        shown = show(load_picture(question, Path(run.images) if run.images else None), run.view, run.tokens)
        spatial = question.mode == "natural" and run.box_prompt
        prompts = [ask_for_box(turn.question) if spatial else turn.question for turn in question.turns]
        found = respond(engine, chat, shown, prompts, max_new_tokens=run.max_new_tokens)
        out: Sample = [(question, {})]
        for index in range(len(question.turns)):
            out += _turn(engine, run, question, shown, prompts, found, index)
        return out
    except QZoomError as error:
        return [(question, {}), (Skip(content_id(question), str(error)), {})]


def _turn(
    engine: Engine,
    run: RegionRun,
    question: Question,
    shown: Shown,
    prompts: Sequence[str],
    found: Responses,
    index: int,
) -> Sample:
    heads = run.heads[question.mode]
    by_heads = run.sink_by == "heads" and bool(heads.sinks)
    layers = sorted({layer for layer, _ in (*heads.pointing, *(heads.sinks if by_heads else ()))})
    state = found.states[index]
    span = state.prompt.spans[0]
    question_id = content_id(question)
    response = Response(
        question_id,
        index,
        prompts[index],
        found.texts[index],
        found.tokens[index],
        shown.picture.size_px,
        span.features.grid,
        run.view,
    )
    attention = attention_of(engine, found, index, layers)
    if attention is None:
        reason = f"Turn {index + 1}: the model gave no answer, so there is no attention to take."
        return [(response, {}), (Skip(question_id, reason), {})]
    grounding = attention.mean_of(heads.pointing).cpu().numpy().astype(np.float32)
    if by_heads:
        sink = attention.mean_of(heads.sinks).cpu().numpy().astype(np.float32)
    elif run.sink_by == "norm":
        sink = sink_cells(state.hidden, span, run.sink_ratio).cpu().numpy().astype(np.float32)
    else:
        sink = np.zeros_like(grounding)
    kind = "heads" if by_heads else run.sink_by if run.sink_by == "norm" else "none"
    maps = {"grounding": grounding, "sink": sink}
    looked = Attention(content_id(response), heads.pointing, kind, heads.sinks if by_heads else ())
    turn: Turn = question.turns[index]
    label, labels = label_record(
        sink,
        grounding,
        run.tristate,
        view=run.view,
        size_px=shown.size_px,
        boxes=turn.boxes,
        question=question_id,
        turn=index,
        response=content_id(response),
        attention=content_id(looked, {name: tensor_digest(array) for name, array in maps.items()}),
        text=found.texts[index],
        prompt=turn.question,
    )
    return [(response, {}), (looked, maps), (label, {"labels": labels})]
