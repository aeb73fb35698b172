"""Stage 3, first half: every question answered once on every rung of a ladder of resolutions (method.md 8).

The answers are kept as they are; `labels.gate` turns them into targets when the gate is trained, so that the published
rules and the naive ablation come from the same records.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, QZoomError
from qzoom.labels.gate import Trajectory, categorise
from qzoom.labels.processes import ModelChoice, run_shares
from qzoom.labels.region_job import base_digest
from qzoom.labels.region_run import sample_of
from qzoom.labels.respond import respond, show
from qzoom.records.questions import load_picture
from qzoom.records.schema import Ladder, Provenance, Question, Record, Skip, content_id
from qzoom.records.store import RecordStore, RecordWriter, start_store

__all__ = ["GateReport", "GateRun", "LabelGate", "climb", "gate_report", "label_gate"]


@dataclass(frozen=True, slots=True)
class GateRun:
    """Everything that decides the ladders.

    Args:
        ladder: visual tokens of each rung, rising; at least three.
        max_new_tokens: longest answer.
        images: folder of the pictures, when they have moved.
    """

    ladder: tuple[int, ...] = (64, 128, 256, 512)
    max_new_tokens: int = 32
    images: str = ""

    def __post_init__(self) -> None:
        if len(self.ladder) < 3 or list(self.ladder) != sorted(set(self.ladder)) or self.ladder[0] < 1:
            raise ConfigError(
                f"A ladder needs at least three rising numbers of visual tokens, not {list(self.ladder)}."
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")

    def settings(self) -> dict[str, Any]:
        """As JSON values, without what may change between reruns."""
        values = asdict(self)
        del values["images"]
        return values


@dataclass(frozen=True, slots=True)
class GateReport:
    """What climbing came to.

    Args:
        ladders: questions answered on every rung.
        transitions: wrong on the first rungs and right from one on: the ones to learn from.
        easy: right everywhere.
        dropped: unstable, contradicting the annotation, or right and wrong in turn.
        skipped: questions left out.
        reasons: the first few reasons.
    """

    ladders: int
    transitions: int
    easy: int
    dropped: int
    skipped: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelGate:
    """The job of one process."""

    run: GateRun

    def __call__(
        self, engine: Engine, questions: Sequence[Question], folder: Path, number: int, on_question: Callable[[], None]
    ) -> None:
        """Climb a share."""
        plain = dataclasses.replace(engine, gate=None, region=None)
        chat = ChatEncoder(engine.backbone)
        with RecordWriter(folder, number) as writer:
            for question in questions:
                sample = sample_of(question)
                if sample not in writer.done:
                    writer.append(sample, climb(plain, chat, self.run, question))
                on_question()


def climb(
    engine: Engine, chat: ChatEncoder, run: GateRun, question: Question
) -> list[tuple[Record, Mapping[str, np.ndarray]]]:
    """The ladders of a question's turns that have a known answer, or why there are none."""
    question_id = content_id(question)
    known = [i for i, turn in enumerate(question.turns) if turn.answers]
    if not known:
        return [(question, {}), (Skip(question_id, "No turn has an answer, which gate labels need."), {})]
    try:
        picture = load_picture(question, Path(run.images) if run.images else None)
        texts = [question.turns[i].question for i in known]
        rungs = [
            respond(engine, chat, show(picture, "dynamic", tokens), texts, max_new_tokens=run.max_new_tokens).texts
            for tokens in run.ladder
        ]
    except QZoomError as error:
        return [(question, {}), (Skip(question_id, str(error)), {})]
    out: list[tuple[Record, Mapping[str, np.ndarray]]] = [(question, {})]
    for place, index in enumerate(known):
        answers = tuple(rung[place] for rung in rungs)
        out.append((Ladder(question_id, index, run.ladder, answers, question.turns[index].answers[0]), {}))
    return out


def label_gate(
    choice: ModelChoice,
    questions: Sequence[Question],
    folder: Path,
    run: GateRun,
    *,
    seed: int = 0,
    processes: int = 1,
    fresh: bool = False,
    on_question: Callable[[int], None] = lambda _: None,
) -> GateReport:
    """Climb the ladder with every question; a rerun continues. Arguments and errors as `label_regions`."""
    engine = choice.load()
    provenance = Provenance(
        model=choice.name,
        weights=base_digest(engine),
        revision=getattr(engine.backbone.model.config, "_commit_hash", None) or choice.revision,
        prompt="question",
        seed=seed,
        sizes={"ladder": list(run.ladder), "max_new_tokens": run.max_new_tokens},
    )
    start_store(folder, "gate", run.settings(), provenance, fresh=fresh)
    own = engine if processes == 1 else None
    run_shares(LabelGate(run), choice, own, questions, folder, processes=processes, on_question=on_question)
    return gate_report(folder)


def gate_report(folder: Path) -> GateReport:
    """Figures of a store of ladders."""
    store = RecordStore(folder)
    kinds = Counter(
        categorise(Trajectory(ladder.tokens, ladder.answers, ladder.annotation)) for _, ladder in store.of_kind(Ladder)
    )
    skips = [skip.reason for _, skip in store.of_kind(Skip)]
    return GateReport(
        kinds.total(), kinds["hard"], kinds["easy"], kinds["dropped"], len(skips), tuple(dict.fromkeys(skips))[:5]
    )
