"""The zooming gap: ask a task in several views, and measure how much more accurate a model is on the region alone.

Only questions with an answer box enter the gap, the same questions in every view; a question that failed in a view is
wrong there and is not left out. Negatives, whose target is absent, are counted separately. The full view is asked
first: its answers show which questions have a box. All views have the same limit on visual tokens. Draws are seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qzoom.config import TokenBudget
from qzoom.data.cells import AREA_BINS, area_bin, area_share
from qzoom.data.samples import AnswerRow, SampleQuestion, Task, read_answers
from qzoom.engine.request import share_tokens
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.evaluation.score import mean, row_score
from qzoom.evaluation.zoom_views import VIEWS, GapSettings, Places, View, base_question, region_task, target_boxes
from qzoom.model import QZoom
from qzoom.scoring.agree import normalise
from qzoom.scoring.intervals import bootstrap, interval_of, paired_difference

Rows = Mapping[View, Sequence[AnswerRow]]


def compare_gaps(rows: Rows, other: Rows, seed: int = 0) -> dict[str, Any]:
    """This run less another, over the pictures that both answered.

    Args:
        other: the run that it is compared with, for example the model before training.

    Returns:
        `n`, `dropped` (questions that only one run answered), and for each view that both asked, for "gap" (region
        less full) and for "negatives" (full view): this run's figure, the other's, their difference and its 95 %
        interval; for the gap also `closed`, the share of the other's gap that is gone.

    Raises:
        DataError: the runs share no question, or give one different right answers.
    """
    mine, theirs = _by_key(rows), _by_key(other)
    keys = [key for key in mine if key in theirs]
    for key in keys:
        if mine[key].question != theirs[key].question:
            raise DataError(
                f"The runs differ in question {key[1]} about {key[0]!r}; only runs over the same data can be compared."
            )
    if not keys:
        raise DataError("The two runs have no question in common; only runs over the same data can be compared.")
    entering = {(row.picture, row.index) for row in rows["full"] if enters_gap(row)}
    views = [view for view in VIEWS if view in rows and view in other]
    placed = [(mine[key], theirs[key]) for key in keys if key in entering]
    negatives = [(mine[key], theirs[key]) for key in keys if mine[key].negative]
    dropped = len(mine.keys() ^ theirs.keys())
    out: dict[str, Any] = {"n": len(placed), "dropped": dropped}
    for view in views:
        out[view] = _paired(placed, lambda item, view=view: item.scores[view], seed)
    if "region" in views:
        out["gap"] = _paired(placed, lambda item: item.scores["region"] - item.scores["full"], seed)
        if out["gap"] is not None:
            before = out["gap"]["other"]
            out["gap"]["closed"] = (before - out["gap"]["this"]) / before if before > 0 else None
    out["negatives"] = _paired(negatives, lambda item: item.scores["full"], seed)
    return out


def _by_key(rows: Rows) -> dict[tuple[str, int], ScoredQuestion]:
    return {(item.picture, item.index): item for item in scored(rows)[0]}


def _paired(pairs: Sequence[tuple[ScoredQuestion, ScoredQuestion]], value: Any, seed: int) -> dict[str, Any] | None:
    """Both means, their difference and its interval; None without pairs."""
    if not pairs:
        return None
    this, other = ([value(item) for item in side] for side in zip(*pairs, strict=True))
    return {"n": len(pairs)} | paired_difference(this, other, [first.picture for first, _ in pairs], seed)


Variant = Literal["strict", "harness"]
_NONE = ("none", "noneofthese", "noneoftheabove", "noneofthem", "notpresent", "absent")


@dataclass(frozen=True, slots=True)
class ScoredQuestion:
    """One question with its score in every view; the unit of all figures."""

    picture: str
    index: int
    question: tuple[str, str]  # its text and right answer, to tell runs over other data apart
    kind: str
    area: str | None  # bin of its region; None where the region is not known
    scores: Mapping[View, float]  # from 0 to 1, by view
    negative: bool


def is_negative(row: AnswerRow | SampleQuestion) -> bool:
    """Whether what is asked about is absent: marked so, or answered with "none", also as the right option's text."""
    if row.negative:
        return True
    answers = [row.answer, *row.answers]
    if row.choices and len(row.answer) == 1 and 0 <= ord(row.answer) - ord("A") < len(row.choices):
        answers.append(row.choices[ord(row.answer) - ord("A")])
    return any(normalise(text).rstrip(".") in _NONE for text in answers)


def enters_gap(row: AnswerRow) -> bool:
    """Whether a question counts: its answer has a place. One that could not even be read counts, as wrong."""
    unreadable = row.field == "unusable" and row.error is not None
    return unreadable or (bool(row.boxes) and not is_negative(row))


def scored(
    rows: Mapping[View, Sequence[AnswerRow]], variant: Variant = "strict", places: Places = "auto"
) -> tuple[list[ScoredQuestion], int]:
    """All questions of the full view with their scores in every view. Returns the questions, in order, and how many
    pictures were dropped because a view has not answered them all."""
    by_key = {view: {_key(view, row): row for row in given} for view, given in rows.items()}
    missing = {
        row.picture
        for row in rows["full"]
        for view in rows
        if _is_asked(view, row) and (row.picture, row.index) not in by_key[view]
    }
    out = []
    for row in rows["full"]:
        if row.picture in missing:
            continue
        key = (row.picture, row.index)
        scores = {view: row_score(by_key[view][key], variant) for view in rows if _is_asked(view, row)}
        boxes = target_boxes(row.field, row.boxes, places)
        size = area_bin(area_share(boxes, row.size_px)) if boxes else None
        question = (row.question, row.answer)
        out.append(ScoredQuestion(*key, question, row.field, size, scores, is_negative(row)))
    return out, len(missing)


def measure_gap(rows: Mapping[View, Sequence[AnswerRow]], seed: int = 0, places: Places = "auto") -> dict[str, Any]:
    """The figures of a run as JSON values; shares from 0 to 1, None for a share of nothing or a view not asked.

    Args:
        rows: per view; the full view's are all questions, the others' at least those that enter the gap.
        places: the rule that the region follows, for the bins of its area.

    Returns:
        `n` and `pictures`: questions with a place, and how many pictures they are about; the mean score of each view by
        its name, and `intervals`, 95 % by pictures; `gap` (region less full) and `zoom_gain` (zoom less full), each
        with its paired interval; `per_kind` and `per_area`: n, accuracies, gap and its interval per field and per bin
        of the region's area; `negatives`: n and accuracy on questions whose target is absent; `yes_no`: of questions
        answered so n, the share that truly is yes, and the share said yes by view; `without_place`: questions that
        are neither; `harness`: accuracies as a benchmark's own harness gives them; `errors`: failed questions per view,
        counted as wrong; `visual_tokens`: means; `dropped`: pictures that some view has not answered yet.
    """
    views = [view for view in VIEWS if view in rows]
    every, dropped = scored(rows, places=places)
    harness, _ = scored(rows, "harness")
    entering = {(row.picture, row.index) for row in rows["full"] if enters_gap(row)}
    placed = [item for item in every if (item.picture, item.index) in entering]
    negatives = [item for item in every if item.negative]
    used = {(item.picture, item.index) for item in placed}
    own = {view: [row for row in rows[view] if _key(view, row) in used] for view in views}
    drawn = _drawn(placed, views, seed)
    gap, gap_interval = _less_full("region", placed, drawn)
    gain, gain_interval = _less_full("zoom", placed, drawn)
    return {
        "n": len(placed),
        "pictures": len({item.picture for item in placed}),
        **dict.fromkeys(VIEWS),
        **_accuracy(placed, views),
        "intervals": {view: list(interval_of(drawn[view])) if placed else None for view in views},
        "gap": gap,
        "gap_interval": gap_interval,
        "zoom_gain": gain,
        "zoom_gain_interval": gain_interval,
        "per_kind": _groups(placed, views, seed, lambda item: item.kind, sorted({item.kind for item in placed})),
        "per_area": _groups(placed, views, seed, lambda item: item.area, AREA_BINS),
        "negatives": {"n": len(negatives)} | _accuracy(negatives, [v for v in views if v in ("full", "zoom")]),
        "yes_no": _yes_no(rows),
        "without_place": len(every) - len(placed) - sum(not _in(item, used) for item in negatives),
        "harness": _accuracy([item for item in harness if _in(item, used)], views),
        "errors": {view: sum(row.error is not None for row in own[view]) for view in views},
        "visual_tokens": {view: mean(row.visual_tokens for row in own[view] if row.error is None) for view in views},
        "dropped": dropped,
    }


def _key(view: View, row: AnswerRow) -> tuple[str, int]:
    return base_question(row) if view in ("region", "boxed") else (row.picture, row.index)


def _is_asked(view: View, row: AnswerRow) -> bool:
    return view in ("full", "zoom") or enters_gap(row)


def _in(item: ScoredQuestion, keys: set[tuple[str, int]]) -> bool:
    return (item.picture, item.index) in keys


def _accuracy(items: Sequence[ScoredQuestion], views: Sequence[View]) -> dict[Any, float | None]:
    return {view: mean(item.scores[view] for item in items) for view in views}


def _less_full(
    view: View, items: Sequence[ScoredQuestion], drawn: Mapping[View, np.ndarray]
) -> tuple[float | None, list[float] | None]:
    """A view less the full one, with its interval by pairs; None where it was not asked or nothing counts."""
    if view not in drawn:
        return None, None
    difference = float(np.mean([item.scores[view] - item.scores["full"] for item in items]))
    return difference, list(interval_of(drawn[view] - drawn["full"]))


def _drawn(items: Sequence[ScoredQuestion], views: Sequence[View], seed: int) -> dict[View, np.ndarray]:
    """Means of every view over the same draws of pictures."""
    if not items:
        return {}
    scores = np.array([[item.scores[view] for item in items] for view in views])
    return dict(zip(views, bootstrap(scores, [item.picture for item in items], seed), strict=True))


def _groups(
    items: Sequence[ScoredQuestion],
    views: Sequence[View],
    seed: int,
    name: Callable[[ScoredQuestion], str | None],
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Figures per group, groups without a question left out."""
    out: dict[str, dict[str, Any]] = {}
    for value in names:
        group = [item for item in items if name(item) == value]
        if not group:
            continue
        out[value] = {"n": len(group), **_accuracy(group, views)}
        if "region" in views:
            out[value]["gap"], out[value]["gap_interval"] = _less_full("region", group, _drawn(group, views, seed))
    return out


def _yes_no(rows: Mapping[View, Sequence[AnswerRow]]) -> dict[str, Any]:
    """How often yes is the truth, and how often it is said."""
    views: list[View] = [view for view in ("full", "zoom") if view in rows]
    binary = {view: [row for row in rows[view] if normalise(row.answer) in ("yes", "no")] for view in views}
    truth = binary["full"]
    predicted = {view: mean(normalise(r.prediction).startswith("yes") for r in own) for view, own in binary.items()}
    return {"n": len(truth), "truly_yes": mean(normalise(row.answer) == "yes" for row in truth), "said_yes": predicted}


Progress = Callable[[View], Callable[[int, int], None] | None]


ViewAnswers = tuple[dict[View, list[AnswerRow]], dict[str, Any]]
"""The answers of a run per view, in the order asked, and what stands beside the figures: the task's identity, model,
settings."""


def default_limit(model: QZoom) -> int:
    """Visual tokens of a question where none are stated: what the checkpoint allows for both views together, else
    the most that the image processor allows."""
    config, standard = model.config, model.engine.backbone.default_budget()
    if config.coarse_tokens is None:
        return standard.max_tokens
    return config.coarse_tokens.max_tokens + (config.region_tokens or config.coarse_tokens).max_tokens


def ask_views(
    model: QZoom,
    task: Task,
    settings: GapSettings,
    *,
    limit: int | None = None,
    output: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> ViewAnswers:
    """Ask all questions in every view.

    Args:
        output: folder of the kept answers, one file a view; a rerun continues them.
        progress: gives each view's listener for (pictures done, in all).

    Raises:
        HeadsMissingError: the zoom view of a model that cannot zoom.
        ConfigError, DataError: `output` holds something else, or no question has a place.
    """
    if "zoom" in settings.views and not model.has_region:
        raise HeadsMissingError("This model has no region branch, so it has no zoom view; leave it out of the views.")
    if output is not None and output.is_file():
        raise ConfigError(f"{output} is a file; the answers of the views need a folder.")
    numbers = {name: number for number, name in enumerate(task.ids)}
    rows: dict[View, list[AnswerRow]] = {}
    for view in settings.views:
        view_task = task
        if view in ("region", "boxed"):
            targets = [(row.picture, numbers[row.picture], row.index) for row in rows["full"] if enters_gap(row)]
            view_task = region_task(task, view, targets, settings, model.engine.backbone.token_px)
        rows[view] = run(
            model,
            view_task,
            _options(model, view, settings),
            limit=limit if view_task is task else None,
            output=None if output is None else output / f"{view}.jsonl",
            fresh=fresh,
            on_picture=progress(view) if progress else None,
        )
        if view == "full" and not any(enters_gap(row) for row in rows["full"]):
            raise DataError("None of the questions has a box, so no gap can be measured; use data with boxes.")
    return rows, task.identity | {"model": model.name} | settings.to_dict()


def read_views(folder: Path) -> ViewAnswers:
    """The stored answers of a run (DataError: not the folder of such a run)."""
    rows: dict[View, list[AnswerRow]] = {}
    about: dict[str, Any] = {}
    for view in VIEWS:
        path = folder / f"{view}.jsonl"
        if not path.is_file():
            continue
        header, rows[view] = read_answers(path)
        questions = header["settings"].get("questions", {})
        options = header["settings"].get("options", {})
        own: dict[str, Any] = {"zoom_mode": options.get("zoom")} if view == "zoom" else {}
        if view == "full":
            total = (options.get("coarse_tokens") or {}).get("max_tokens")
            own = {"max_visual_tokens": total, "max_new_tokens": options.get("max_new_tokens")}
        about = questions | about | {"model": header["about"].get("model", "")} | own
    if "full" not in rows:
        raise DataError(f"{folder}: no answers of the full view; name a folder that `qzoom eval zoomgap -o` wrote.")
    about.pop("view", None)
    return rows, about | {"views": list(rows)}


def _options(model: QZoom, view: View, settings: GapSettings) -> EvalOptions:
    zoom = settings.zoom if view == "zoom" else "never"
    standard: TokenBudget = model.engine.backbone.default_budget()
    coarse, region = share_tokens(zoom, model.config, standard, total=settings.max_visual_tokens)
    return EvalOptions(zoom, coarse, region, max_new_tokens=settings.max_new_tokens)
