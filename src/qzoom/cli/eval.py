"""`qzoom eval`: how good the answers are on pictures with known answers, as one JSON line or a few lines to read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.config import TokenBudget
    from qzoom.evaluation.runner import EvalOptions
    from qzoom.evaluation.score import Scores
    from qzoom.model import QZoom
    from qzoom.types import ZoomMode

__all__ = ["evaluate"]


Task = Annotated[str, typer.Argument(metavar="TASK", show_default=False, help="receipts, documents or scenes.")]
Data = Annotated[Path | None, typer.Option(show_default=False, help="receipts: the folder that holds NAME.jsonl.")]
Split = Annotated[str | None, typer.Option(metavar="NAME", show_default="dev", help="receipts: which file.")]
Seed = Annotated[int | None, typer.Option(min=0, show_default="0", help="documents, scenes: number of first picture.")]
Count = Annotated[int | None, typer.Option(min=1, show_default="100", help="documents, scenes: how many pictures.")]
Limit = Annotated[int | None, typer.Option(min=1, show_default=False, help="The first so many pictures only.")]
MaxVisualTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Most visual tokens of a question: all for the coarse look with --zoom never, else half for the "
        "coarse look and half for the regions; where one of the two is given, the other gets the rest.",
    ),
]
Output = Annotated[
    Path | None, typer.Option(show_default=False, help="Keep every answer here (JSON lines); a rerun continues it.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start --output anew.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one call asks for, options read and checked."""

    zoom: ZoomMode
    limits: tuple[TokenBudget | int | None, TokenBudget | int | None, int | None]  # coarse, region, both together
    thresholds: tuple[str | None, float | None, float | None]
    max_new_tokens: int
    limit: int | None
    output: Path | None
    fresh: bool


def evaluate(
    task: Task,
    data: Data = None,
    split: Split = None,
    seed: Seed = None,
    count: Count = None,
    limit: Limit = None,
    model: options.Model = "tiny",
    zoom: options.Zoom = "auto",
    max_visual_tokens: MaxVisualTokens = None,
    coarse_tokens: options.CoarseTokens = None,
    region_tokens: options.RegionTokens = None,
    output: Output = None,
    fresh: Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    max_new_tokens: MaxNewTokens = 128,
    gate_threshold: options.GateThreshold = None,
    region_threshold: options.RegionThreshold = None,
    preset: options.Preset = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure answers, regions, tokens and time on pictures with known answers.

    Exact match forgives case, spaces and currency. A picture is looked at once for all its questions, which share the
    time of that look. A question that fails counts as wrong.

    Example: qzoom eval receipts --data receipts --split dev --max-visual-tokens 288 --json
    """
    from qzoom.cli.loading import load_model
    from qzoom.errors import ConfigError
    from qzoom.evaluation.tasks.registry import open_task

    _check_usage(task, {"--data": data, "--split": split}, {"--seed": seed, "--count": count}, output, fresh)
    coarse = options.parse_tokens(coarse_tokens, "--coarse-tokens")
    region = options.parse_tokens(region_tokens, "--region-tokens")
    try:
        chosen = open_task(task, data=data, split=split or "dev", seed=seed or 0, count=count or 100)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(quiet=quiet)
    console.hush_libraries()
    limits = (coarse, region, max_visual_tokens)
    wanted = (preset, gate_threshold, region_threshold)
    asked = _Asked(zoom, limits, wanted, max_new_tokens, limit, output, fresh)
    _measure(load_model(model, revision, device, dtype), chosen, task, asked, console, json)


def _measure(reader: QZoom, task: Any, name: str, asked: _Asked, console: Console, json: bool) -> None:
    """Ask every question and print the figures."""
    from qzoom.cli.loading import thresholds
    from qzoom.evaluation.budgets import share_tokens
    from qzoom.evaluation.runner import EvalOptions, run
    from qzoom.evaluation.score import score

    coarse, region, total = asked.limits
    standard = reader.engine.backbone.default_budget()
    limits = share_tokens(asked.zoom, reader.config, standard, coarse=coarse, region=region, total=total)
    asking = EvalOptions(asked.zoom, *limits, *thresholds(reader, *asked.thresholds), asked.max_new_tokens)
    with _progress(console, name) as on_picture:
        rows = run(
            reader, task, asking, limit=asked.limit, output=asked.output, fresh=asked.fresh, on_picture=on_picture
        )
    scores = score(rows, task.fields)
    if scores.errors:
        first = next(row.error for row in rows if row.error)
        console.note(f"{scores.errors} of {scores.n} questions failed and count as wrong; the first: {first}")
    if json:
        console.record(task.identity | {"model": reader.name} | _asked(asking) | scores.to_dict())
        return
    for line in _lines(scores):
        console.result(line)


def _check_usage(
    task: str, for_files: dict[str, Any], for_seeds: dict[str, Any], output: Path | None, fresh: bool
) -> None:
    """Options that do not belong to the task are mistakes.

    Raises:
        typer.BadParameter: one was given.
    """
    for flag, value in (for_seeds if task == "receipts" else for_files).items():
        if value is not None and task in ("receipts", "documents", "scenes"):
            raise typer.BadParameter(f"{flag} has no meaning for the task {task}; leave it out.")
    if fresh and output is None:
        raise typer.BadParameter("--fresh needs --output.")


@contextmanager
def _progress(console: Console, task: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error when a person watches it."""
    if console.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    import rich.console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        line = bar.add_task(f"{task}, pictures", total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


def _asked(asking: EvalOptions) -> dict[str, Any]:
    """The settings beside the figures; a limit is [minimum, maximum] or null for the model's own."""
    limits = {"coarse_tokens": asking.coarse_tokens, "region_tokens": asking.region_tokens}
    shown = {name: [b.min_tokens, b.max_tokens] if b else None for name, b in limits.items()}
    return {"zoom": asking.zoom, **shown}


def _lines(scores: Scores) -> list[str]:
    """The figures for people."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    exact = ", ".join(f"{name} {share(value)}" for name, value in scores.exact_match.items())
    lines = [
        f"questions      {scores.n}" + (f" ({scores.errors} failed)" if scores.errors else ""),
        f"exact match    {exact}",
        f"ANLS           {share(scores.anls)}",
        f"zoomed         {share(scores.zoomed)}",
    ]
    for name, group in scores.difficulty.items():
        lines.append(
            f"{name:<15}{group['n']} questions, exact match {share(group['exact_match'])}, "
            f"zoomed {share(group['zoomed'])}"
        )
    if scores.zoomed:
        lines.append(f"regions        hit {share(scores.hit_rate)}, area {share(scores.box_area)} of the picture")
    if scores.visual_tokens is not None and scores.seconds is not None:
        lines.append(f"cost           {scores.visual_tokens:.1f} visual tokens, {scores.seconds:.3f} s per question")
    return lines
