"""`qzoom eval`: how good the answers are on pictures with known answers, as one JSON line or a few lines to read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.evaluation.runner import EvalOptions
    from qzoom.evaluation.score import Scores

__all__ = ["evaluate"]


def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", show_default=False, help="receipts, documents or scenes.")],
    data: Annotated[
        Path | None, typer.Option(show_default=False, help="receipts: the folder that holds NAME.jsonl.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", show_default="dev", help="receipts: which file.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, show_default="0", help="documents, scenes: number of the first picture.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, show_default="100", help="documents, scenes: how many pictures.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="The first so many pictures only.")
    ] = None,
    model: options.Model = "tiny",
    zoom: options.Zoom = "auto",
    max_visual_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Most visual tokens of a question: all for the coarse look with --zoom never, else half for the "
            "coarse look and half for the regions; where one of the two is given, the other gets the rest.",
        ),
    ] = None,
    coarse_tokens: options.CoarseTokens = None,
    region_tokens: options.RegionTokens = None,
    output: Annotated[
        Path | None,
        typer.Option(show_default=False, help="Keep every answer here (JSON lines); a rerun continues the file."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start --output anew.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
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
    from qzoom.cli.loading import load_model, thresholds
    from qzoom.errors import ConfigError
    from qzoom.evaluation.budgets import share_tokens
    from qzoom.evaluation.runner import EvalOptions, run
    from qzoom.evaluation.score import score
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
    reader = load_model(model, revision, device, dtype)
    gate, area = thresholds(reader, preset, gate_threshold, region_threshold)
    limits = share_tokens(
        zoom,
        reader.config,
        reader.engine.backbone.default_budget(),
        coarse=coarse,
        region=region,
        total=max_visual_tokens,
    )
    asking = EvalOptions(zoom, *limits, gate, area, max_new_tokens)
    with _progress(console, task) as on_picture:
        rows = run(reader, chosen, asking, limit=limit, output=output, fresh=fresh, on_picture=on_picture)
    scores = score(rows, chosen.fields)
    if scores.errors:
        first = next(row.error for row in rows if row.error)
        console.note(f"{scores.errors} of {scores.n} questions failed and count as wrong; the first: {first}")
    if json:
        console.record(chosen.identity | {"model": reader.name} | _asked(asking) | scores.to_dict())
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
