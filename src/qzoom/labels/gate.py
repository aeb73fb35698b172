"""Stage-3 labels: one question answered on a ladder of resolutions becomes "enough" or "look closer" (method.md 8).

What a trajectory may become is given as an explicit distribution (`label_outcomes`), so that it can be tested, summed
over a data set, or drawn from (`draw_label`). `select_items` picks the questions that a training set is made of.

    tokens      64    128   256   512        consensus: what the two highest agree on
    answers     12    72    72    72         wrong, right, right, right: a transition ("hard")
    label       1     0                      the two highest are never used: they define what is right

Stage 3, first half: every question answered once on every rung of a ladder of resolutions (method.md 8).

The answers are kept as they are; `labels.gate` turns them into targets when the gate is trained, so that the published
rules and the naive ablation come from the same records.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qzoom.data.questions import load_picture
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError, QZoomError
from qzoom.labels.label_regions import base_digest, sample_of
from qzoom.labels.maps import IGNORE
from qzoom.labels.respond import respond, show
from qzoom.labels.workers import ModelChoice, run_shares
from qzoom.scoring.agree import answers_match, lowered, normalise_answer
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Ladder, Provenance, Question, Record, Skip, content_id

__all__ = [
    "Category",
    "GateReport",
    "GateRun",
    "LabelGate",
    "Outcome",
    "Strategy",
    "Trajectory",
    "categorise",
    "climb",
    "draw_label",
    "gate_report",
    "label_gate",
    "label_outcomes",
    "select_items",
]


Category = Literal["hard", "easy", "dropped"]
Strategy = Literal["consistency", "prediction_vs_gt"]

TOP = 2  # the highest resolutions, whose shared answer is the reference
WRONG_SHARE = 0.9  # how often a transition is drawn as "look closer"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One question along the ladder.

    Args:
        tokens: visual tokens of each rung, rising.
        answers: the model's answer on each rung (texts; anything else is turned into one).
        annotation: the data set's answer.

    Raises:
        DataError: no rungs, rungs that do not rise, or another number of answers.
    """

    tokens: tuple[int, ...]
    answers: tuple[Any, ...]
    annotation: Any

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.answers):
            raise DataError(
                f"A trajectory needs one answer per resolution, but has {len(self.answers)} answers for "
                f"{len(self.tokens)} resolutions."
            )
        if list(self.tokens) != sorted(set(self.tokens)):
            raise DataError(f"The resolutions of a trajectory must rise: {list(self.tokens)}.")

    @property
    def consensus(self) -> str | None:
        """The normalised answer that the two highest rungs share (of a single rung: its own), None if they differ."""
        top = {normalise_answer(answer) for answer in self.answers[-TOP:]}
        return top.pop() if len(top) == 1 else None

    @property
    def agrees(self) -> bool:
        """Whether the consensus and the annotation contain each other."""
        return self.consensus is not None and answers_match(self.consensus, lowered(self.annotation))

    def right(self) -> list[bool]:
        """For each rung whether its answer matches the consensus; empty without one."""
        consensus = self.consensus
        if consensus is None:
            return []
        return [answers_match(consensus, normalise_answer(answer)) for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trajectory may become.

    Args:
        label: 1 look closer, 0 enough, -100 leave out.
        tokens: resolution of the coarse look for this sample (the lowest when left out).
        probability: share of draws.
    """

    label: int
    tokens: int
    probability: float


def categorise(trajectory: Trajectory) -> Category:
    """What the item filter does with a question.

    "hard" (kept): wrong on the first rungs, right on all later ones. "easy" (pool): right everywhere. "dropped": the
    two highest rungs differ, their answer contradicts the annotation, or right and wrong alternate.
    """
    right = trajectory.right()
    if not trajectory.agrees or not _is_step(right):
        return "dropped"
    return "easy" if all(right) else "hard"


def label_outcomes(trajectory: Trajectory, strategy: Strategy = "consistency") -> tuple[Outcome, ...]:
    """All labels that may be drawn, with their probabilities, by label and resolution.

    Ladders of at most two rungs have no rung below the reference, so a question that is right on all of them says
    nothing about how little would be enough: it is left out (the release stops with an error there).

    Args:
        trajectory: the question.
        strategy: "consistency" (method.md 8.6), or the ablation "prediction_vs_gt": one rung at random, compared with
            the annotation.
    """
    if strategy == "prediction_vs_gt":
        return _naive_outcomes(trajectory)
    lowest, tokens = trajectory.tokens[0], trajectory.tokens
    right = trajectory.right()
    if not _is_step(right):
        return (Outcome(IGNORE, lowest, 1.0),)
    wrong = [i for i, is_right in enumerate(right) if not is_right]
    enough = [i for i, is_right in enumerate(right[: max(0, len(right) - TOP)]) if is_right]
    shares: list[tuple[int, int, float]] = []
    zero_share = 1 - WRONG_SHARE if wrong else 1.0
    if wrong and trajectory.agrees:
        last = wrong[-2:]
        shares += [(1, tokens[i], WRONG_SHARE / len(last)) for i in last]
    elif wrong:
        shares.append((IGNORE, lowest, WRONG_SHARE))
    shares += [(0, tokens[i], zero_share / len(enough)) for i in enough]
    if not enough:
        shares.append((IGNORE, lowest, zero_share))
    return _merged(shares)


def draw_label(trajectory: Trajectory, rng: random.Random, strategy: Strategy = "consistency") -> tuple[int, int]:
    """One draw from `label_outcomes`.

    Args:
        trajectory: the question.
        rng: a seeded generator.
        strategy: as in `label_outcomes`.

    Returns:
        The label and the resolution in visual tokens.
    """
    outcomes = label_outcomes(trajectory, strategy)
    chosen = rng.choices(outcomes, weights=[o.probability for o in outcomes])[0]
    return chosen.label, chosen.tokens


def select_items(trajectories: Sequence[Trajectory], seed: int) -> list[int]:
    """Indices of the questions to train on: all hard ones in order, then as many easy ones drawn at random.

    Args:
        trajectories: the mined questions.
        seed: of Python's generator.
    """
    kinds = [categorise(trajectory) for trajectory in trajectories]
    hard = [i for i, kind in enumerate(kinds) if kind == "hard"]
    easy = [i for i, kind in enumerate(kinds) if kind == "easy"]
    return hard + random.Random(seed).sample(easy, min(len(hard), len(easy)))


def _is_step(right: list[bool]) -> bool:
    """Wrong rungs, if any, come first; False without a consensus."""
    return bool(right) and right == sorted(right)


def _naive_outcomes(trajectory: Trajectory) -> tuple[Outcome, ...]:
    annotation = normalise_answer(trajectory.annotation)
    rungs = range(max(len(trajectory.tokens) - TOP, 1))
    shares = []
    for i in rungs:
        answer = normalise_answer(trajectory.answers[i])
        enough = bool(answer and annotation) and answers_match(answer, annotation)
        shares.append((0 if enough else 1, trajectory.tokens[i], 1 / len(rungs)))
    return _merged(shares)


def _merged(shares: Iterable[tuple[int, int, float]]) -> tuple[Outcome, ...]:
    total: dict[tuple[int, int], float] = defaultdict(float)
    for label, tokens, share in shares:
        total[label, tokens] += share
    return tuple(Outcome(label, tokens, share) for (label, tokens), share in sorted(total.items()))


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
