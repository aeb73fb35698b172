"""`qzoom distill`: all images through all steps, stored as it goes, and the data set at the end.

An image is one unit of work: a bounded number of them is processed at once, new results are written in the order of the
images, and only counts stay in memory. A rerun takes what is stored and computes the rest.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qzoom.cluster import ray_data, ray_running
from qzoom.distill.card import Stats, make_card
from qzoom.distill.decontaminate import BenchmarkHashes, Match
from qzoom.distill.export import write_dataset
from qzoom.distill.items import ImageRef, Item, item_from_values
from qzoom.distill.known import make_key
from qzoom.distill.pictures import ImageSource, Views, list_sources, load_source
from qzoom.distill.pipeline import SCAN, Advance, PictureResult, Row, Stored, make_steps, process_picture
from qzoom.distill.recipe import DatasetRecipe, step_settings
from qzoom.distill.roles import CACHE, build_roles
from qzoom.errors import ConfigError, LaterError, QZoomError, StopRunError
from qzoom.settings import from_mapping, to_dict
from qzoom.store.log import Log, LogWriter, unwritable, write_atomic
from qzoom.store.schema import from_values

_SYNC_S = 2.0


@dataclass(slots=True)
class RunReport:
    """The report of a run."""

    stats: Stats = field(default_factory=Stats)  # images and items, counted
    rows: dict[str, int] = field(default_factory=dict)  # exported rows of each split
    computed: dict[str, int] = field(default_factory=dict)  # step to inputs that were computed in this run
    compared: bool = False  # whether the images were compared with benchmarks
    matches: list[Match] = field(default_factory=list)  # training images that look like a benchmark's
    cost: list[dict[str, Any]] = field(default_factory=list)  # costs of this run's calls, by role and endpoint
    folder: str = ""  # of the data set

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **self.stats.to_dict(),
            "rows": self.rows,
            "computed": self.computed,
            "compared": self.compared,
            "matches": [match.picture for match in self.matches],
            "cost": self.cost,
            "dataset": self.folder,
        }


def run_recipe(
    recipe: DatasetRecipe,
    folder: Path,
    *,
    limit: int | None = None,
    fresh_from: str | None = None,
    on_picture: Advance | None = None,
    on_export: Advance | None = None,
) -> RunReport:
    """Run a recipe, or resume it.

    Args:
        folder: for the stored steps and the data set.
        limit: only the first images; None takes all.
        fresh_from: discard what this step and the later ones stored; "pictures" discards everything, paid calls apart.
        on_picture: called with (images done, images in all).
        on_export: called with (items exported, items in all).

    Raises:
        ConfigError: the stored steps were made with other settings, or another run is writing there.
        DataError: a stored line is damaged, or the disk refuses.
        StopRunError: the budget is spent, a key is refused, or an endpoint was down from the start.
    """
    if fresh_from is not None and fresh_from not in (SCAN, *recipe.steps):
        raise ConfigError(f"No step {fresh_from!r} in this recipe; its steps: {', '.join(recipe.steps)}.")
    sources = list_sources(recipe.pictures)[:limit]
    with ExitStack() as stack:
        stores = _open_stores(recipe, folder, fresh_from, stack)
        report = RunReport(computed=dict.fromkeys(stores, 0))
        roles = stack.enter_context(closing(build_roles(recipe.roles, folder / CACHE)))
        roles.check()
        views = Views()
        steps, key_of = make_steps(recipe, views, roles), make_key(recipe)
        if recipe.engine == "ray":
            for rows in compute_with_ray(recipe, folder, sources, stores, on_picture):
                store_rows(rows, stores, report.computed)
            on_picture = None

        def work(source: ImageSource) -> PictureResult:
            return process_picture(source, steps, views, key_of, lambda step, key: stores[step].get(key))

        in_order = closing(_in_order(sources, work, recipe.workers, roles.end))
        with open_kept(folder / "steps" / "kept.tmp") as kept, in_order as results:
            for number, result in enumerate(_without_duplicates(results, report), start=1):
                store_rows(result.rows, stores, report.computed)
                report.stats.add(result)
                for item in result.items:
                    if item.kept:
                        add_kept(kept, item)
                if on_picture is not None:
                    on_picture(number, len(sources))
            report.cost = [asdict(cost) for cost in roles.costs()]
            _export(recipe, folder / "dataset", kept, report, on_export)
    write_atomic(folder / "report.json", (json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    return report


def _open_stores(recipe: DatasetRecipe, folder: Path, fresh_from: str | None, stack: ExitStack) -> dict[str, LogWriter]:
    """The logs of all steps."""
    stores = {}
    fresh = False
    for step in (SCAN, *recipe.steps):
        fresh = fresh or step == fresh_from
        path = folder / "steps" / f"{step}.jsonl"
        advice = f"use --fresh --step {step} to replace it and the later steps, --fresh for all, or another folder"
        log = LogWriter(path, step, step_settings(recipe, step), fresh=fresh, sync_s=_SYNC_S, advice=advice)
        stores[step] = stack.enter_context(log)
    return stores


def _without_duplicates(results: Iterable[PictureResult], report: RunReport) -> Iterator[PictureResult]:
    """The results; of images with equal content only the first one keeps its items."""
    seen: set[int] = set()
    for result in results:
        if result.picture is None:
            yield result
            continue
        short = int(result.picture.digest, 16)
        if short in seen:
            report.stats.duplicates += 1
            yield PictureResult(result.source, rows=[row for row in result.rows if row[0] == SCAN])
        else:
            seen.add(short)
            yield result


def store_rows(rows: Iterable[Row], stores: Mapping[str, LogWriter], computed: dict[str, int]) -> None:
    """Write new results; two images of equal content give the same ones, of which the first are kept."""
    for step, key, out in rows:
        if key not in stores[step]:
            stores[step].append(key, out)
            computed[step] += 1


def _in_order(
    sources: Iterable[ImageSource],
    work: Callable[[ImageSource], PictureResult],
    workers: int,
    end: Callable[..., None],
) -> Generator[PictureResult]:
    """Results in the order of the sources, at most twice as many submitted as there are workers. `end` keeps the
    running ones from paying on when the run stops."""
    waiting: deque[Future[PictureResult]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="distill")
    try:
        for source in sources:
            waiting.append(pool.submit(work, source))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException as error:
        end(cancel=not isinstance(error, Exception))  # interrupted, or an error of the caller
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _export(
    recipe: DatasetRecipe, target: Path, kept: sqlite3.Connection, report: RunReport, on_export: Advance | None
) -> None:
    """Write the data set from the kept items."""
    (total,) = kept.execute("SELECT count(*) FROM kept").fetchone()
    hashes = BenchmarkHashes(recipe.decontaminate) if recipe.decontaminate.against else None
    report.compared = hashes is not None

    def drop(picture: ImageRef) -> bool:
        if hashes is None:
            return False
        match = hashes.nearest(load_source(picture.source, picture.root).image, picture.digest)
        if match is not None:
            report.matches.append(match)
        return match is not None and recipe.decontaminate.drop

    def items() -> Iterator[Item]:
        for number, item in enumerate(read_kept(kept)):
            if on_export is not None:
                on_export(number, total)
            report.stats.add_kept(item)
            yield item

    def card(rows: dict[str, int]) -> str:
        return make_card(recipe, report.stats, rows, report.matches)

    report.rows = write_dataset(items(), target, recipe.export, card, drop)
    report.folder = str(target)


@contextmanager
def open_kept(path: Path) -> Iterator[sqlite3.Connection]:
    """A file of kept items, sorted by image and id and removed at the end: workers finish in any order and a rerun
    skips what is stored, but the data is always the same (DataError: the disk refuses)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            file.execute("CREATE TABLE kept (picture, id, item BLOB, PRIMARY KEY (picture, id)) WITHOUT ROWID")
            yield file
    except sqlite3.Error as error:
        raise unwritable(path, error) from error
    finally:
        path.unlink(missing_ok=True)


def add_kept(file: sqlite3.Connection, item: Item) -> None:
    """Add an item; of equal ids the first one stays."""
    row = (item.picture.digest, item.id, item.to_json().encode("utf-8", "surrogatepass"))
    file.execute("INSERT OR IGNORE INTO kept VALUES (?, ?, ?)", row)


def read_kept(file: sqlite3.Connection) -> Iterator[Item]:
    """All items by the digest of their image and then by id."""
    for (line,) in file.execute("SELECT item FROM kept ORDER BY picture, id"):
        yield item_from_values(json.loads(line.decode("utf-8", "surrogatepass")), "a kept item")


# -- the same steps on Ray Data ----------------------------------------------------------------------------------------
# Ray's processes do not write: each takes an image with its stored results through the steps, and the driver stores
# what comes back. The cache of paid calls is one file; on a cluster the folder must be visible to all machines.


def compute_with_ray(
    recipe: DatasetRecipe,
    folder: Path,
    sources: Sequence[ImageSource],
    stores: Mapping[str, Log],
    on_picture: Advance | None = None,
) -> Iterator[list[Row]]:
    """Compute what is missing in the stores of a run, and yield the new results image by image (ConfigError: Ray is not
    installed, or its cluster cannot be reached; StopRunError: the run cannot go on)."""
    rows = _missing(recipe, sources, stores)
    whole = len(sources) - len(rows)
    if on_picture is not None:
        on_picture(whole, len(sources))
    if not rows:
        return
    with ray_running("data", recipe.ray.address, recipe.ray.actors + 1, ", or use --engine inprocess") as ray:
        data = ray_data(ray, rows, blocks=4 * recipe.ray.actors)
        about = {"recipe": to_dict(recipe), "folder": str(folder.resolve())}
        results = data.map_batches(
            _Worker,
            fn_constructor_args=(json.dumps(about),),
            batch_size=recipe.ray.threads,
            compute=ray.data.ActorPoolStrategy(size=recipe.ray.actors),
            num_cpus=1,
        )
        for number, row in enumerate(results.iter_rows(), start=whole + 1):
            result = json.loads(row["result"])
            if "stop" in result:
                raise StopRunError(result["stop"])
            yield [(step, key, out) for step, key, out in result["rows"]]
            if on_picture is not None:
                on_picture(number, len(sources))


class _Worker:
    """One of Ray's processes: the steps of the recipe, several images at once."""

    def __init__(self, about: str) -> None:
        values = json.loads(about)
        recipe = from_mapping(DatasetRecipe, values["recipe"], "the recipe")
        self._views = Views()
        self._failed = ""
        try:
            roles = build_roles(recipe.roles, Path(values["folder"]) / CACHE)
            roles.check()
            self._steps, self._key_of = make_steps(recipe, self._views, roles), make_key(recipe)
        except QZoomError as error:
            self._failed = str(error)
        self._pool = ThreadPoolExecutor(recipe.ray.threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """A column of images to a column of results, both as JSON."""
        return {"result": list(self._pool.map(self._one, batch["picture"]))}

    def _one(self, text: str) -> str:
        if self._failed:
            return json.dumps({"stop": self._failed})
        values = json.loads(text)
        source: ImageSource = from_values(ImageSource, values["source"], "the image")
        stored = {(step, key): out for step, key, out in values["stored"]}
        try:
            result = process_picture(source, self._steps, self._views, self._key_of, lambda *at: stored.get(at))
        except QZoomError as error:
            return json.dumps({"stop": str(error)})
        return json.dumps({"rows": result.rows})


def _missing(recipe: DatasetRecipe, sources: Sequence[ImageSource], stores: Mapping[str, Log]) -> list[dict[str, str]]:
    """Images whose results are not complete, each with its stored results."""

    def not_yet(item: Item) -> Sequence[Item]:
        raise LaterError("a step has not been run")

    rows: list[dict[str, str]] = []
    steps, views, key_of = dict.fromkeys(recipe.steps, not_yet), Views(), make_key(recipe)
    for source in sources:
        stored: list[Row] = []
        complete = source.key in stores[SCAN]
        if complete:
            complete = not process_picture(source, steps, views, key_of, _recording(stores, stored)).waiting
        if not complete:
            rows.append({"picture": json.dumps({"source": dataclasses.asdict(source), "stored": stored})})
    return rows


def _recording(stores: Mapping[str, Log], rows: list[Row]) -> Stored:
    """Looks results up and records those that exist."""

    def look_up(step: str, key: str) -> list[Any] | None:
        out = stores[step].get(key)
        if out is not None:
            rows.append((step, key, out))
        return out

    return look_up
