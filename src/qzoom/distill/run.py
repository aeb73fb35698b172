"""`qzoom distill`: all pictures through all steps, stored as it goes, and the data set at the end.

A picture is one unit of work: a bounded number of them is under way, their new results are written in the order of the
pictures, and nothing but counts stays in memory. A rerun takes what is stored and computes the rest.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qzoom.distill.card import Totals, make_card
from qzoom.distill.decontaminate import Benchmark, Match
from qzoom.distill.export import write_dataset
from qzoom.distill.items import Picture
from qzoom.distill.kept import KeptItems
from qzoom.distill.pictures import Source, list_sources, load_source
from qzoom.distill.pipeline import SCAN, Done, Pipeline, Row, follow, open_pipeline
from qzoom.distill.recipe import DistillRecipe, step_settings
from qzoom.distill.store import StepStore, StoreLock
from qzoom.errors import ConfigError
from qzoom.store.log import write_atomic

__all__ = ["RunOptions", "RunReport", "run_recipe"]

EXPORT = "export"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a recipe is run this time.

    Args:
        step: run this step alone, on what the earlier ones stored; None runs all.
        limit: only the first pictures; None takes all.
        fresh: throw away what is stored, with `step` from that step on.
    """

    step: str | None = None
    limit: int | None = None
    fresh: bool = False


@dataclass(slots=True)
class RunReport:
    """What a run did.

    Args:
        totals: pictures and items, counted.
        rows: exported rows of each split; empty when nothing was exported.
        computed: step to inputs that were worked on in this run.
        dropped: training pictures that look like a benchmark's.
        cost: what calls of this run cost, by role and endpoint.
        folder: of the data set.
    """

    totals: Totals = field(default_factory=Totals)
    rows: dict[str, int] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    dropped: list[Match] = field(default_factory=list)
    cost: list[dict[str, Any]] = field(default_factory=list)
    folder: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **self.totals.to_dict(),
            "rows": self.rows,
            "computed": self.computed,
            "dropped": [match.picture for match in self.dropped],
            "cost": self.cost,
            "dataset": self.folder,
        }


def run_recipe(
    recipe: DistillRecipe,
    folder: Path,
    options: RunOptions | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    on_export: Callable[[int, int], None] | None = None,
) -> RunReport:
    """Run a recipe, or go on with it.

    Args:
        recipe: what to make.
        folder: for the stored steps and the data set.
        options: how it is run this time.
        on_picture: told (pictures done, pictures in all).
        on_export: told (items exported, items in all).

    Raises:
        ConfigError: the stored steps were made with other settings, or another run is at work there.
        DataError: a stored line is damaged, or the disk refuses.
        StopRunError: the budget is spent, a key is refused, or an endpoint was down from the start.
    """
    options = options or RunOptions()
    if options.step is not None and options.step not in (*recipe.steps, EXPORT):
        raise ConfigError(f"No step {options.step!r} in this recipe; its steps: {', '.join((*recipe.steps, EXPORT))}.")
    sources = list_sources(recipe.pictures)[: options.limit]
    with ExitStack() as stack:
        stack.enter_context(StoreLock(folder))
        stores = _open_stores(recipe, folder, options, stack)
        report = RunReport(computed=dict.fromkeys(stores, 0))
        compute = _may_compute(recipe, options)
        pipeline = stack.enter_context(open_pipeline(recipe, folder, compute))
        if recipe.engine == "ray" and compute != frozenset():
            from qzoom.distill.ray import compute_with_ray

            def keep(rows: Sequence[Row]) -> None:
                store_rows(rows, stores, report.computed)

            compute_with_ray(recipe, folder, sources, stores, compute, keep, on_picture)
            compute, on_picture = frozenset(), None
        with KeptItems(folder / "steps" / "kept.tmp") as kept:
            _walk(pipeline, sources, stores, compute, report, kept, on_picture)
            report.cost = pipeline.cost()
            if options.step in (None, EXPORT):
                _export(recipe, folder, kept, report, on_export)
    write_atomic(folder / "report.json", (json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    return report


def _may_compute(recipe: DistillRecipe, options: RunOptions) -> frozenset[str] | None:
    """Names of the steps that may compute; None for all."""
    if options.step is None:
        return None
    if options.step == EXPORT:
        return frozenset()
    return frozenset({options.step, SCAN} if options.step == recipe.steps[0] else {options.step})


def _open_stores(recipe: DistillRecipe, folder: Path, options: RunOptions, stack: ExitStack) -> dict[str, StepStore]:
    """The stores of all steps that this run reads or writes."""
    stores = {}
    fresh = options.fresh and options.step is None
    for step in (SCAN, *recipe.steps):
        fresh = fresh or (options.fresh and step == options.step)
        path = folder / "steps" / f"{step}.jsonl"
        stores[step] = StepStore(path, step, step_settings(recipe, step), fresh=fresh)
        stack.callback(stores[step].close)
    return stores


def _walk(
    pipeline: Pipeline,
    sources: Sequence[Source],
    stores: dict[str, StepStore],
    compute: frozenset[str] | None,
    report: RunReport,
    kept: KeptItems,
    on_picture: Callable[[int, int], None] | None,
) -> None:
    """Every picture through the steps; results are stored and counted in the order of the pictures."""

    def work(source: Source) -> Done:
        return follow(source, pipeline.steps, pipeline.views, lambda step, key: stores[step].get(key), compute)

    seen: set[int] = set()
    for number, done in enumerate(_in_order(sources, work, pipeline.workers), start=1):
        if done.picture is not None:
            short = int(done.picture.digest, 16)
            if short in seen:
                report.totals.duplicates += 1
                store_rows([row for row in done.rows if row[0] == SCAN], stores, report.computed)
                done = Done(done.source)
            seen.add(short)
        store_rows(done.rows, stores, report.computed)
        report.totals.add(done)
        for item in done.items:
            if item.kept and compute in (None, frozenset()):
                kept.add(item)
        if on_picture is not None:
            on_picture(number, len(sources))


def store_rows(rows: Iterable[Row], stores: dict[str, StepStore], computed: dict[str, int]) -> None:
    """Write new results; two pictures of equal content give the same ones, of which the first are kept."""
    for step, key, out in rows:
        if key not in stores[step]:
            stores[step].add(key, out)
            computed[step] += 1


def _in_order(sources: Iterable[Source], work: Callable[[Source], Done], workers: int) -> Iterator[Done]:
    """Results in the order of the sources, at most twice as many under way as there are workers."""
    waiting: deque[Future[Done]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="distill")
    try:
        for source in sources:
            waiting.append(pool.submit(work, source))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _export(
    recipe: DistillRecipe,
    folder: Path,
    kept: KeptItems,
    report: RunReport,
    on_export: Callable[[int, int], None] | None,
) -> None:
    """Write the data set from the kept items."""
    benchmark = Benchmark(recipe.audit) if recipe.audit.against else None

    def matches(picture: Picture) -> bool:
        if benchmark is None:
            return False
        found = benchmark.nearest(load_source(picture.source, picture.root).image, picture.digest)
        if found is not None:
            report.dropped.append(found)
        return found is not None and recipe.audit.drop

    def items() -> Iterator[Any]:
        for number, item in enumerate(kept.in_order()):
            if on_export is not None:
                on_export(number, len(kept))
            report.totals.add_kept(item)
            yield item

    target = folder / "dataset"
    report.rows = write_dataset(
        items(), target, recipe.export, lambda rows: make_card(recipe, report.totals, rows, report.dropped), matches
    )
    report.folder = str(target)
