"""Stage 2, first half: questions on which zooming loses or gains the right answer (docs/method.md 6).

Every question is answered from the coarse pass and with the region, and exact rules judge both answers. What they
cannot decide a judge may; its verdict is a later record of the same turn and replaces the earlier one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from qzoom.engine.state import Engine
from qzoom.errors import ConfigError
from qzoom.images.load import LoadedImage
from qzoom.labels.respond import answer_both_ways
from qzoom.labels.settings import HardCaseRecipe
from qzoom.labels.workers import Labeller, LabelRun, fill_store, turn_labeller
from qzoom.model import QZoom
from qzoom.scoring.agree import decide_exact
from qzoom.scoring.judge import Judge, JudgeFailure
from qzoom.settings import to_dict
from qzoom.store.records import RecordStore, RecordWriter, StoreLock, log_facts
from qzoom.store.schema import Question, Record, Skip, Verdict, content_id

ZoomEffect = Literal["hard", "improvements", "both_right", "both_wrong", "undecided"]
JUDGE_WRITER = 99


@dataclass(frozen=True, slots=True)
class HardCaseReport:
    """Figures of a store of verdicts, in turns."""

    turns: int  # answered both ways
    hard: int  # the coarse answer was right, the zoomed one wrong
    improvements: int  # the other way round
    both_right: int  # both right
    both_wrong: int  # both wrong
    undecided: int  # neither rules nor judge could say; they are in no other count
    skipped: int  # questions left out
    judge_failures: int = 0  # failed requests of this run
    reasons: tuple[str, ...] = ()  # the first few of either
    unread: int = 0  # questions that are left for a later run, since their picture could not be read
    unread_reason: str = ""  # of the first of them


def zoom_effect(verdict: Verdict) -> ZoomEffect:
    """What a verdict says about zooming."""
    if verdict.coarse_right is None or verdict.zoomed_right is None:
        return "undecided"
    if verdict.coarse_right:
        return "both_right" if verdict.zoomed_right else "hard"
    return "improvements" if verdict.zoomed_right else "both_wrong"


def current_verdicts(store: RecordStore) -> list[Verdict]:
    """The verdict that counts for each turn: the judge's, where there is one, in the order of the first ones."""
    verdicts: dict[tuple[str, int], Verdict] = {}
    for _, verdict in store.of_kind(Verdict):
        turn = (verdict.question, verdict.turn)
        if turn not in verdicts or verdicts[turn].by == "nobody":
            verdicts[turn] = verdict
    return list(verdicts.values())


def label_hard_cases(
    run: LabelRun,
    questions: Sequence[Question],
    recipe: HardCaseRecipe,
    *,
    judge: Judge | None = None,
    parallel: int = 4,
) -> HardCaseReport:
    """Answer, then judge what the rules leave undecided; a rerun resumes both. Errors as `label_regions`
    (HeadsMissingError: the model has no region branch; ConfigError: another judge has judged there)."""
    engine = run.model.load(zooms=True)
    with StoreLock(run.folder) as lock:
        if judge is not None and not run.fresh:
            _check_judge(run.folder, judge)
        unread = fill_store(
            run,
            engine,
            questions,
            partial(hard_case_labeller, recipe=recipe, images=run.images),
            lock=lock,
            purpose="mine",
            settings=to_dict(recipe),
            sizes={"coarse_tokens": recipe.coarse_tokens, "region_tokens": recipe.region_tokens},
            zooms=True,
        )
        if judge is not None:
            judge_undecided(run.folder, judge, parallel=parallel)
    report = hard_case_report(run.folder, judge)
    return dataclasses.replace(report, unread=len(unread), unread_reason="".join(unread[:1]))


def hard_case_labeller(engine: Engine, *, recipe: HardCaseRecipe, images: str = "") -> Labeller:
    """The function that answers one question's turns both ways and judges the answers by exact rules."""
    positions = "aligned" if recipe.aligned and engine.backbone.position_axes > 1 else engine.config.positions
    model = QZoom(dataclasses.replace(engine, config=engine.config.replace(positions=positions)))

    def label(picture: LoadedImage, question: Question, turns: list[int]) -> list[Record]:
        answers = answer_both_ways(
            model,
            picture,
            [question.turns[i].question for i in turns],
            max_new_tokens=recipe.max_new_tokens,
            coarse_tokens=recipe.coarse_tokens,
            region_tokens=recipe.region_tokens,
        )
        records: list[Record] = []
        for index, (coarse, zoomed) in zip(turns, answers, strict=True):
            rights = [decide_exact(answer.text, question.turns[index].answers) for answer in (coarse, zoomed)]
            decided = None not in rights
            verdict = Verdict(
                content_id(question),
                index,
                coarse.text,
                zoomed.text,
                rights[0],
                rights[1],
                "rule" if decided else "nobody",
                tuple(region.box for region in zoomed.regions),
                "" if decided else "The rules cannot tell, and no judge has said.",
            )
            records.append(verdict)
        return records

    return turn_labeller(images, "No turn has an answer to judge by.", label)


def judge_undecided(folder: Path, judge: Judge, *, parallel: int = 4) -> None:
    """Ask the judge about every undecided verdict of a store; failures stay undecided, for another run
    (BudgetSpentError, EndpointError: as `Judge.right`; what was judged before is stored; ConfigError: another judge has
    judged there)."""
    _check_judge(folder, judge)
    store = RecordStore(folder)
    waiting = [verdict for verdict in current_verdicts(store) if zoom_effect(verdict) == "undecided"]

    def decide(verdict: Verdict) -> Verdict | None:
        question = store.get(verdict.question).record
        assert isinstance(question, Question)
        turn = question.turns[verdict.turn]
        rights = []
        for text, right in ((verdict.coarse, verdict.coarse_right), (verdict.zoomed, verdict.zoomed_right)):
            try:
                rights.append(judge.right(turn.question, turn.answers, text) if right is None else right)
            except JudgeFailure:
                return None
        return dataclasses.replace(verdict, coarse_right=rights[0], zoomed_right=rights[1], by="judge", note="")

    facts = {"judge": judge.model}
    with RecordWriter(folder, JUDGE_WRITER, facts=facts) as writer, ThreadPoolExecutor(parallel) as pool:
        try:
            for verdict, judged in zip(waiting, pool.map(decide, waiting), strict=True):
                if judged is not None:
                    writer.append(f"judge/{verdict.question}/{verdict.turn}", [(judged, {})])
        except BaseException as error:
            judge.end(cancel=not isinstance(error, Exception))
            pool.shutdown(cancel_futures=True)
            raise


def _check_judge(folder: Path, judge: Judge) -> None:
    """Refuse to mix the verdicts of two judges; a store without any, or from before judges were noted, takes every
    one."""
    earlier = log_facts(folder, JUDGE_WRITER).get("judge", judge.model)
    if earlier != judge.model:
        raise ConfigError(
            f"{folder} has verdicts of another judge ({earlier!r}, not {judge.model!r}); name that judge, use --fresh "
            "to replace the records, or another folder."
        )


def hard_case_report(folder: Path, judge: Judge | None = None) -> HardCaseReport:
    """Figures of a store of verdicts."""
    store = RecordStore(folder)
    effects = [zoom_effect(verdict) for verdict in current_verdicts(store)]
    skips = [skip.reason for _, skip in store.of_kind(Skip)]
    failures = judge.reasons if judge is not None else []
    return HardCaseReport(
        turns=len(effects),
        hard=effects.count("hard"),
        improvements=effects.count("improvements"),
        both_right=effects.count("both_right"),
        both_wrong=effects.count("both_wrong"),
        undecided=effects.count("undecided"),
        skipped=len(skips),
        judge_failures=len(failures),
        reasons=tuple(dict.fromkeys([*failures, *skips]))[:5],
    )
