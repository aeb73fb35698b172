"""Stage 2, first half: where zooming loses what the coarse look knew, and where it gains (method.md 6).

First every question is answered from the coarse look and with the region read, and exact rules judge both. Then what
the rules left open goes to a judge, if there is one; its verdict is a later record of the same turn and counts instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qzoom.config import TokenBudget
from qzoom.data.questions import load_picture
from qzoom.engine.state import Engine
from qzoom.errors import HeadsMissingError, QZoomError
from qzoom.labels.label_regions import base_digest, sample_of
from qzoom.labels.workers import ModelChoice, run_shares
from qzoom.model import QZoom
from qzoom.scoring.judge import Judge, JudgeFailure, rule
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Provenance, Question, Record, Skip, Verdict, content_id
from qzoom.types import Answer

__all__ = ["Kind", "MineReport", "MineRun", "current_verdicts", "judge_open", "kind_of", "mine", "mine_report"]


Kind = Literal["hard", "improvements", "kept", "both_wrong", "open"]
JUDGE_WRITER = 99


@dataclass(frozen=True, slots=True)
class MineRun:
    """Everything that decides the answers.

    Args:
        coarse_tokens: most visual tokens of the coarse look.
        region_tokens: most visual tokens of the regions.
        max_new_tokens: longest answer.
        aligned: give regions aligned positions, as stage 2 trains them, whatever the checkpoint says.
        images: folder of the pictures, when they have moved.
    """

    coarse_tokens: int = 576
    region_tokens: int = 576
    max_new_tokens: int = 128
    aligned: bool = True
    images: str = ""

    def settings(self) -> dict[str, Any]:
        """As JSON values, without what may change between reruns."""
        values = asdict(self)
        del values["images"]
        return values

    def __call__(
        self, engine: Engine, questions: Sequence[Question], folder: Path, number: int, on_question: Callable[[], None]
    ) -> None:
        """Answer a share, as one process's job."""
        positions = "aligned" if self.aligned else engine.config.positions
        made = dataclasses.replace(engine, config=engine.config.replace(positions=positions))
        model = QZoom(made)
        with RecordWriter(folder, number) as writer:
            for question in questions:
                if sample_of(question) not in writer.done:
                    writer.append(sample_of(question), self._answered(model, question))
                on_question()

    def _answered(self, model: QZoom, question: Question) -> list[tuple[Record, Mapping[str, np.ndarray]]]:
        question_id = content_id(question)
        known = [i for i, turn in enumerate(question.turns) if turn.answers]
        if not known:
            return [(question, {}), (Skip(question_id, "No turn has an answer to judge by."), {})]
        try:
            picture = load_picture(question, Path(self.images) if self.images else None)
            found: dict[str, list[Answer]] = {}
            for zoom in ("never", "always"):
                found[zoom] = model.ask_batch(
                    [(picture, question.turns[i].question) for i in known],
                    zoom=zoom,
                    max_new_tokens=self.max_new_tokens,
                    coarse_tokens=TokenBudget(1, self.coarse_tokens),
                    region_tokens=TokenBudget(1, self.region_tokens),
                )
        except QZoomError as error:
            return [(question, {}), (Skip(question_id, str(error)), {})]
        out: list[tuple[Record, Mapping[str, np.ndarray]]] = [(question, {})]
        for place, index in enumerate(known):
            coarse, zoomed = found["never"][place], found["always"][place]
            rights = [rule(answer.text, question.turns[index].answers) for answer in (coarse, zoomed)]
            decided = None not in rights
            verdict = Verdict(
                question_id,
                index,
                coarse.text,
                zoomed.text,
                rights[0],
                rights[1],
                "rule" if decided else "nobody",
                tuple(region.box for region in zoomed.regions),
                "" if decided else "The rules cannot tell, and no judge has said.",
            )
            out.append((verdict, {}))
        return out


@dataclass(frozen=True, slots=True)
class MineReport:
    """What mining came to, in turns.

    Args:
        turns: answered both ways.
        hard: the coarse answer was right, the zoomed one wrong.
        improvements: the other way round.
        kept: both right.
        both_wrong: both wrong.
        open: nobody could say; they are in no other count.
        skipped: questions left out.
        judge_failures: of this run.
        reasons: the first few of either.
    """

    turns: int
    hard: int
    improvements: int
    kept: int
    both_wrong: int
    open: int
    skipped: int
    judge_failures: int = 0
    reasons: tuple[str, ...] = ()


def kind_of(verdict: Verdict) -> Kind:
    """What a verdict says about zooming."""
    if verdict.coarse_right is None or verdict.zoomed_right is None:
        return "open"
    if verdict.coarse_right:
        return "kept" if verdict.zoomed_right else "hard"
    return "improvements" if verdict.zoomed_right else "both_wrong"


def current_verdicts(store: RecordStore) -> list[Verdict]:
    """The verdict that counts for each turn: the judge's, where it has said, in the order of the first ones."""
    out: dict[tuple[str, int], Verdict] = {}
    for _, verdict in store.of_kind(Verdict):
        place = (verdict.question, verdict.turn)
        if place not in out or out[place].by == "nobody":
            out[place] = verdict
    return list(out.values())


def mine(
    choice: ModelChoice,
    questions: Sequence[Question],
    folder: Path,
    run: MineRun,
    *,
    judge: Judge | None = None,
    parallel: int = 4,
    seed: int = 0,
    processes: int = 1,
    fresh: bool = False,
    on_question: Callable[[int], None] = lambda _: None,
) -> MineReport:
    """Answer, then judge; a rerun continues both. Arguments and errors as `label_regions`.

    Args:
        judge: for what the rules leave open; None leaves it open.
        parallel: how many requests it gets at once.
    """
    engine = choice.load()
    if engine.region is None:
        raise HeadsMissingError(f"{choice.name} has no region branch, so it cannot zoom; name the model of stage 1.")
    provenance = Provenance(
        model=choice.name,
        weights=base_digest(engine),
        revision=getattr(engine.backbone.model.config, "_commit_hash", None) or choice.revision,
        prompt="question",
        seed=seed,
        sizes={"coarse_tokens": run.coarse_tokens, "region_tokens": run.region_tokens},
    )
    start_store(folder, "mine", run.settings(), provenance, fresh=fresh)
    own = engine if processes == 1 else None
    run_shares(run, choice, own, questions, folder, processes=processes, on_question=on_question)
    if judge is not None:
        judge_open(folder, judge, parallel=parallel)
    return mine_report(folder, judge)


def judge_open(folder: Path, judge: Judge, *, parallel: int = 4) -> None:
    """Ask the judge about every open verdict of a store; failures stay open, for another run.

    Raises:
        BudgetSpentError, EndpointError: as `Judge.right`; what was judged before is kept.
    """
    store = RecordStore(folder)
    waiting = [verdict for verdict in current_verdicts(store) if kind_of(verdict) == "open"]

    def decide(verdict: Verdict) -> Verdict | None:
        question = store.get(verdict.question).record
        assert isinstance(question, Question)
        turn = question.turns[verdict.turn]
        rights = []
        for text, known in ((verdict.coarse, verdict.coarse_right), (verdict.zoomed, verdict.zoomed_right)):
            try:
                rights.append(judge.right(turn.question, turn.answers, text) if known is None else known)
            except JudgeFailure:
                return None
        return dataclasses.replace(verdict, coarse_right=rights[0], zoomed_right=rights[1], by="judge", note="")

    with RecordWriter(folder, JUDGE_WRITER) as writer, ThreadPoolExecutor(parallel) as pool:
        try:
            for verdict, judged in zip(waiting, pool.map(decide, waiting), strict=True):
                if judged is not None:
                    writer.append(f"judge/{verdict.question}/{verdict.turn}", [(judged, {})])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def mine_report(folder: Path, judge: Judge | None = None) -> MineReport:
    """Figures of a store of verdicts."""
    store = RecordStore(folder)
    kinds = [kind_of(verdict) for verdict in current_verdicts(store)]
    skips = [skip.reason for _, skip in store.of_kind(Skip)]
    failures = judge.reasons if judge is not None else []
    reasons: Iterable[str] = dict.fromkeys([*failures, *skips])
    return MineReport(
        turns=len(kinds),
        hard=kinds.count("hard"),
        improvements=kinds.count("improvements"),
        kept=kinds.count("kept"),
        both_wrong=kinds.count("both_wrong"),
        open=kinds.count("open"),
        skipped=len(skips),
        judge_failures=len(failures),
        reasons=tuple(reasons)[:5],
    )
