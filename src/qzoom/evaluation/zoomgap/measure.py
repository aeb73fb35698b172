"""Ask the views of a task one after the other, or read what a run has kept of them.

The full view comes first: its answers say which questions have a place. All views may spend the same visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.config import TokenBudget
from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.asking import EvalOptions
from qzoom.evaluation.budgets import share_tokens
from qzoom.evaluation.records import AnswerRow, Task
from qzoom.evaluation.runner import run
from qzoom.evaluation.store import read_answers
from qzoom.evaluation.zoomgap.figures import enters_gap
from qzoom.evaluation.zoomgap.settings import VIEWS, GapSettings, View
from qzoom.evaluation.zoomgap.views import PlaceTask

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = ["KeptViews", "ask_views", "default_limit", "read_views"]

Progress = Callable[[View], Callable[[int, int], None] | None]


@dataclass(frozen=True, slots=True, eq=False)
class KeptViews:
    """The answers of a run.

    Args:
        rows: per view, in the order asked.
        about: what stands beside the figures: the task's identity, model, settings.
    """

    rows: dict[View, list[AnswerRow]]
    about: dict[str, Any]


def default_limit(model: QZoom) -> int:
    """Visual tokens of a question where none are stated: what the checkpoint's own two looks may spend together, else
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
) -> KeptViews:
    """Ask all questions in every view.

    Args:
        model: the model under test.
        task: pictures and questions.
        settings: the views.
        limit: the first so many pictures only.
        output: folder of the kept answers, one file a view; a rerun continues them.
        fresh: start them anew.
        progress: gives each view's listener for (pictures done, in all).

    Raises:
        HeadsMissingError: the zoom view of a model that cannot zoom.
        ConfigError, DataError: `output` holds something else, or no question has a place.
    """
    if output is not None and output.is_file():
        raise ConfigError(f"{output} is a file; the answers of the views need a folder.")
    rows: dict[View, list[AnswerRow]] = {}
    for view in settings.views:
        asked: Task = task
        if view in ("region", "boxed"):
            asked = _placed(task, rows["full"], view, settings, model.engine.backbone.cell_px)
        rows[view] = run(
            model,
            asked,
            _options(model, view, settings),
            limit=limit if asked is task else None,
            output=None if output is None else output / f"{view}.jsonl",
            fresh=fresh,
            on_picture=progress(view) if progress else None,
        )
        if view == "full" and not any(enters_gap(row) for row in rows["full"]):
            raise DataError("None of the questions has a box, so no gap can be measured; use data with boxes.")
    return KeptViews(rows, task.identity | {"model": model.name} | settings.to_dict())


def read_views(folder: Path) -> KeptViews:
    """The answers that a run has kept.

    Raises:
        DataError: not the folder of such a run.
    """
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
            own = {"max_visual_tokens": _total(options), "max_new_tokens": options.get("max_new_tokens")}
        about = questions | about | {"model": header["about"].get("model", "")} | own
    if "full" not in rows:
        raise DataError(f"{folder}: no answers of the full view; name a folder that `qzoom eval zoomgap -o` wrote.")
    about.pop("view", None)
    return KeptViews(rows, about | {"views": list(rows)})


def _total(options: dict[str, Any]) -> int | None:
    limits = options.get("coarse_tokens")
    return limits.get("max_tokens") if isinstance(limits, dict) else None


def _placed(task: Task, full: list[AnswerRow], view: Any, settings: GapSettings, cell_px: int) -> PlaceTask:
    numbers = {name: number for number, name in enumerate(task.ids)}
    targets = tuple((row.picture, numbers[row.picture], row.index) for row in full if enters_gap(row))
    return PlaceTask(task, view, targets, settings, cell_px)


def _options(model: QZoom, view: View, settings: GapSettings) -> EvalOptions:
    zoom = settings.zoom if view == "zoom" else "never"
    standard: TokenBudget = model.engine.backbone.default_budget()
    coarse, region = share_tokens(zoom, model.config, standard, total=settings.max_visual_tokens)
    return EvalOptions(zoom, coarse, region, max_new_tokens=settings.max_new_tokens)
