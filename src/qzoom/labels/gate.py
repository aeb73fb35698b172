"""Stage 3, first half: gate labels (docs/method.md 8); `qzoom label gate`.

By resolution, every question is answered once at each level of a resolution sweep; by zoom, from the coarse pass alone
and with the region. The answers are stored; they become targets when the gate is trained.

    tokens      64    128   256   512        consensus: the common answer of the two highest levels
    answers     12    72    72    72         wrong, right, right, right: a transition ("hard")
    label       1     0                      the two highest are never used: they define what is right

Labels by zoom suit models whose answers rarely depend on the resolution of the whole image.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.images.load import LoadedImage
from qzoom.labels.maps import IGNORE
from qzoom.labels.respond import answer_both_ways, generate, prepare_image
from qzoom.labels.settings import GateRecipe
from qzoom.labels.workers import Labeller, LabelRun, fill_store, turn_labeller
from qzoom.model import QZoom
from qzoom.scoring.agree import answers_match, exact_match, lowered, normalise_answer
from qzoom.settings import to_dict
from qzoom.store.records import RecordStore, StoreLock
from qzoom.store.schema import Question, Record, ResolutionSweep, Skip, ZoomComparison, content_id

Category = Literal["hard", "easy", "dropped"]
Strategy = Literal["consistency", "prediction_vs_gt"]

TOP = 2  # the highest resolutions, whose shared answer is the reference
WRONG_SHARE = 0.9  # how often a transition is drawn with label 1


def consensus(sweep: ResolutionSweep) -> str | None:
    """The normalised answer that the two highest levels share (of a single level: its own), None if they differ."""
    top = {normalise_answer(answer) for answer in sweep.answers[-TOP:]}
    return top.pop() if len(top) == 1 else None


def right_levels(sweep: ResolutionSweep) -> list[bool]:
    """For each level whether its answer matches the consensus; empty without one."""
    shared = consensus(sweep)
    return [] if shared is None else [answers_match(shared, normalise_answer(answer)) for answer in sweep.answers]


def _agrees(sweep: ResolutionSweep) -> bool:
    """Whether the consensus and the annotation contain each other."""
    shared = consensus(sweep)
    return shared is not None and answers_match(shared, lowered(sweep.annotation))


def categorise(sweep: ResolutionSweep) -> Category:
    """What the item filter does with a question.

    "hard": wrong at the first levels, right at all later ones. "easy": right everywhere. "dropped": the two highest
    levels differ, their answer contradicts the annotation, or right and wrong alternate.
    """
    right = right_levels(sweep)
    if not _agrees(sweep) or not _is_step(right):
        return "dropped"
    return "easy" if all(right) else "hard"


def label_outcomes(sweep: ResolutionSweep, strategy: Strategy = "consistency") -> dict[tuple[int, int], float]:
    """Every (label, visual tokens) that may be drawn with its probability, sorted.

    Labels are 1 (zoom), 0 (coarse is enough) and -100 (leave out, with the lowest resolution). Sweeps of at most two
    levels have no level below the reference, so a question that is right at all of them says nothing about how few
    tokens would be enough: it is left out (the release stops with an error there).

    Args:
        sweep: its answers.
        strategy: "consistency" (method.md 8.6), or the ablation "prediction_vs_gt": one level at random, compared with
            the annotation.
    """
    if strategy == "prediction_vs_gt":
        return _naive_outcomes(sweep)
    tokens, left_out, right = sweep.tokens, (IGNORE, sweep.tokens[0]), right_levels(sweep)
    if not _is_step(right):
        return {left_out: 1.0}
    wrong = [i for i, is_right in enumerate(right) if not is_right]
    enough = [i for i, is_right in enumerate(right[: max(0, len(right) - TOP)]) if is_right]
    shares: dict[tuple[int, int], float] = defaultdict(float)
    if wrong and _agrees(sweep):
        for i in wrong[-2:]:
            shares[1, tokens[i]] += WRONG_SHARE / len(wrong[-2:])
    elif wrong:
        shares[left_out] += WRONG_SHARE
    zero_share = 1 - WRONG_SHARE if wrong else 1.0
    for i in enough:
        shares[0, tokens[i]] += zero_share / len(enough)
    if not enough:
        shares[left_out] += zero_share
    return dict(sorted(shares.items()))


def draw_label(sweep: ResolutionSweep, rng: random.Random, strategy: Strategy = "consistency") -> tuple[int, int]:
    """One draw from `label_outcomes`: the label and the resolution in visual tokens."""
    outcomes = label_outcomes(sweep, strategy)
    return rng.choices(list(outcomes), weights=list(outcomes.values()))[0]


def select_items(sweeps: Sequence[ResolutionSweep], seed: int) -> list[int]:
    """Indices of the questions to train on: all hard ones in order, then as many easy ones drawn at random."""
    kinds = [categorise(sweep) for sweep in sweeps]
    hard = [i for i, kind in enumerate(kinds) if kind == "hard"]
    easy = [i for i, kind in enumerate(kinds) if kind == "easy"]
    return hard + random.Random(seed).sample(easy, min(len(hard), len(easy)))


def zoom_label(comparison: ZoomComparison) -> int | None:
    """0 where the coarse answer is right, 1 where only the zoomed one is, None where neither is."""
    for label, text in ((0, comparison.coarse), (1, comparison.zoomed)):
        if any(exact_match(text, answer) for answer in comparison.answers):
            return label
    return None


def select_balanced(labels: Sequence[int | None], seed: int) -> list[int]:
    """Indices of all questions of the rarer label (0 or 1), and of as many of the other, drawn at random."""
    groups = [[i for i, label in enumerate(labels) if label == target] for target in (0, 1)]
    count = min(len(group) for group in groups)
    rng = random.Random(seed)
    return [index for group in groups for index in rng.sample(group, count)]


@dataclass(frozen=True, slots=True)
class GateReport:
    """Figures of a store of gate labels."""

    questions: int  # turns with an answer at every level, or both ways
    closer: int  # a closer look is needed: wrong at the first levels and right from one on, or right only when zoomed
    enough: int  # the coarse pass is enough: right at every level, or from the coarse pass alone
    dropped: int  # neither can be said, for example since the answers are unstable or contradict the annotation
    skipped: int  # questions left out
    reasons: tuple[str, ...]  # the first few reasons
    unread: int = 0  # questions that are left for a later run, since their picture could not be read
    unread_reason: str = ""  # of the first of them


def label_gate(run: LabelRun, questions: Sequence[Question], recipe: GateRecipe) -> GateReport:
    """Answer every question at each level, or both ways; a rerun resumes. Arguments and errors as `label_regions`
    (HeadsMissingError: labels by zoom of a model without a region branch)."""
    engine = run.model.load(zooms=recipe.by == "zoom")
    with StoreLock(run.folder) as lock:
        unread = fill_store(
            run,
            engine,
            questions,
            partial(gate_labeller, recipe=recipe, images=run.images, seed=run.seed),
            lock=lock,
            purpose="gate",
            settings=to_dict(recipe),
            sizes={"tokens": list(recipe.tokens), "max_new_tokens": recipe.max_new_tokens},
            zooms=recipe.by == "zoom",
        )
    return dataclasses.replace(gate_report(run.folder), unread=len(unread), unread_reason="".join(unread[:1]))


def gate_labeller(engine: Engine, *, recipe: GateRecipe, images: str = "", seed: int = 0) -> Labeller:
    """The function that answers one question; `seed` draws the coarse tokens of a picture for labels by zoom."""
    model, chat = QZoom(engine), ChatEncoder(engine.backbone)
    plain = dataclasses.replace(engine, gate=None, region=None)

    def sweep(picture: LoadedImage, question: Question, turns: list[int]) -> list[Record]:
        texts = [question.turns[i].question for i in turns]
        levels = []
        for tokens in recipe.tokens:
            image = prepare_image(picture, "dynamic", tokens)
            levels.append(generate(plain, chat, image, texts, max_new_tokens=recipe.max_new_tokens).texts)
        question_id = content_id(question)
        return [
            ResolutionSweep(question_id, index, recipe.tokens, answers, question.turns[index].answers[0])
            for index, answers in zip(turns, zip(*levels, strict=True), strict=True)
        ]

    def compare(picture: LoadedImage, question: Question, turns: list[int]) -> list[Record]:
        tokens = random.Random(f"{seed}/{question.image}").choice(recipe.tokens)
        texts = [question.turns[i].question for i in turns]
        answers = answer_both_ways(model, picture, texts, max_new_tokens=recipe.max_new_tokens, coarse_tokens=tokens)
        question_id = content_id(question)
        return [
            ZoomComparison(question_id, index, tokens, coarse.text, zoomed.text, question.turns[index].answers)
            for index, (coarse, zoomed) in zip(turns, answers, strict=True)
        ]

    no_answer = "No turn has an answer, which gate labels need."
    return turn_labeller(images, no_answer, sweep if recipe.by == "resolution" else compare)


def gate_report(folder: Path) -> GateReport:
    """Figures of a store of gate labels."""
    store = RecordStore(folder)
    kinds = Counter(categorise(sweep) for _, sweep in store.of_kind(ResolutionSweep))
    labels = Counter(zoom_label(comparison) for _, comparison in store.of_kind(ZoomComparison))
    reasons = [skip.reason for _, skip in store.of_kind(Skip)]
    return GateReport(
        questions=kinds.total() + labels.total(),
        closer=kinds["hard"] + labels[1],
        enough=kinds["easy"] + labels[0],
        dropped=kinds["dropped"] + labels[None],
        skipped=len(reasons),
        reasons=tuple(dict.fromkeys(reasons))[:5],
    )


def _is_step(right: list[bool]) -> bool:
    """Wrong levels, if any, come first; False without a consensus."""
    return bool(right) and right == sorted(right)


def _naive_outcomes(sweep: ResolutionSweep) -> dict[tuple[int, int], float]:
    annotation = normalise_answer(sweep.annotation)
    levels = range(max(len(sweep.tokens) - TOP, 1))
    shares: dict[tuple[int, int], float] = defaultdict(float)
    for i in levels:
        answer = normalise_answer(sweep.answers[i])
        enough = bool(answer and annotation) and answers_match(answer, annotation)
        shares[0 if enough else 1, sweep.tokens[i]] += 1 / len(levels)
    return dict(sorted(shares.items()))
