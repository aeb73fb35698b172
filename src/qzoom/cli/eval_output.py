"""What `qzoom eval` says: figures as JSON or as lines to read, several seeds side by side, and progress."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.evaluation.runner import EvalOptions
    from qzoom.evaluation.score import Scores

__all__ = ["asked_how", "figures", "over_seeds", "progress"]


def asked_how(asking: EvalOptions) -> dict[str, Any]:
    """The settings beside the figures; a limit is [minimum, maximum] or null for the model's own."""
    limits = {"coarse_tokens": asking.coarse_tokens, "region_tokens": asking.region_tokens}
    shown = {name: [b.min_tokens, b.max_tokens] if b else None for name, b in limits.items()}
    drawn = {"temperature": asking.temperature, "draw": asking.seed} if asking.is_random else {}
    return {"zoom": asking.zoom_mode, "method": asking.method, **shown, **drawn}


def figures(console: Console, scores: Scores, about: dict[str, Any], *, json: bool, title: str = "") -> None:
    """One run's figures; `title` names the run where there are several."""
    if json:
        console.record(about | scores.to_dict())
        return
    if title:
        console.result(f"{title}:")
    from qzoom.evaluation.tables import score_lines

    for line in score_lines(scores):
        console.result(line)


def over_seeds(console: Console, name: str, runs: Sequence[Scores], *, json: bool) -> None:
    """Mean and standard deviation of the task's metric over runs that differ in the seed."""
    found: dict[str, Any] = {"task": name, "seeds": len(runs), "metric": runs[0].metric}
    for variant in ("strict", "harness"):
        values = [getattr(run, variant)["all"] for run in runs]
        found |= {f"{variant}_mean": statistics.fmean(values), f"{variant}_sd": statistics.stdev(values)}
    if json:
        console.record(found)
    else:
        console.result(
            f"{name}, {len(runs)} seeds: {found['metric']} {found['strict_mean']:.1%}, standard deviation "
            f"{found['strict_sd']:.1%}"
        )


@contextmanager
def progress(console: Console, task: str) -> Iterator[Callable[[int, int], None] | None]:
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
