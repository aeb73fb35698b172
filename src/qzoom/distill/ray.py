"""The same steps on Ray Data, from this machine to a cluster.

Ray's processes do not write: each takes a picture with what is stored about it through the steps, and the driver stores
what comes back. Kept calls lie in one file, so processes of one machine never pay for the same call; on a cluster the
folder must be one that all machines see.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.distill.items import KnownQuestion
from qzoom.distill.pictures import Source
from qzoom.distill.pipeline import Row, Stored, follow, named_steps, open_pipeline
from qzoom.distill.recipe import DistillRecipe, recipe_from_values
from qzoom.distill.store import StepStore
from qzoom.distill.views import PictureViews
from qzoom.errors import ConfigError, QZoomError, StopRunError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["compute_with_ray"]


def compute_with_ray(
    recipe: DistillRecipe,
    folder: Path,
    sources: Sequence[Source],
    stores: dict[str, StepStore],
    compute: frozenset[str] | None,
    store: Callable[[Sequence[Row]], None],
    on_picture: Callable[[int, int], None] | None = None,
) -> None:
    """Compute what is missing and store it.

    Args:
        recipe: what to make.
        folder: of the run.
        sources: all pictures.
        stores: what is there, by step.
        compute: steps that may compute; None for all.
        store: writes new results.
        on_picture: told (pictures done, pictures in all).

    Raises:
        ConfigError: Ray is not installed, or its cluster cannot be reached.
        StopRunError: the run cannot go on.
    """
    rows, whole = _missing(recipe, sources, stores, compute)
    if on_picture is not None:
        on_picture(whole, len(sources))
    if not rows:
        return
    with _ray(recipe) as ray:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4 * recipe.ray.actors))
        about: dict[str, Any] = {"recipe": dataclasses.asdict(recipe), "folder": str(folder.resolve())}
        about["compute"] = None if compute is None else sorted(compute)
        done = data.map_batches(
            _Worker,
            fn_constructor_args=(json.dumps(about),),
            batch_size=recipe.ray.threads,
            compute=ray.data.ActorPoolStrategy(size=recipe.ray.actors),
            num_cpus=1,
        )
        for number, row in enumerate(done.iter_rows(), start=whole + 1):
            result = json.loads(row["done"])
            if "stop" in result:
                raise StopRunError(result["stop"])
            store([(step, key, out) for step, key, out in result["rows"]])
            if on_picture is not None:
                on_picture(number, len(sources))


class _Worker:
    """One of Ray's processes: the steps of the recipe, several pictures at once."""

    def __init__(self, about: str) -> None:
        values = json.loads(about)
        self._recipe = recipe_from_values(values["recipe"], "the recipe")
        self._compute = None if values["compute"] is None else frozenset(values["compute"])
        self._open = open_pipeline(self._recipe, Path(values["folder"]), self._compute, self._recipe.ray.threads)
        self._failed = ""
        try:
            self._pipeline = self._open.__enter__()
        except QZoomError as error:
            self._failed = str(error)
        self._pool = ThreadPoolExecutor(self._recipe.ray.threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """A column of pictures to a column of results, both as JSON."""
        return {"done": list(self._pool.map(self._one, batch["picture"]))}

    def _one(self, text: str) -> str:
        if self._failed:
            return json.dumps({"stop": self._failed})
        values = json.loads(text)
        questions = [
            KnownQuestion(q["text"], q["answer"], tuple(tuple(box) for box in q["boxes"]), q["field"])
            for q in values["source"].pop("questions")
        ]
        source = Source(**values["source"], questions=tuple(questions))
        there = {(step, key): out for step, key, out in values["stored"]}
        try:
            pipeline = self._pipeline
            done = follow(source, pipeline.steps, pipeline.views, lambda *at: there.get(at), self._compute)
        except QZoomError as error:
            return json.dumps({"stop": str(error)})
        return json.dumps({"rows": done.rows})


def _missing(
    recipe: DistillRecipe, sources: Sequence[Source], stores: dict[str, StepStore], compute: frozenset[str] | None
) -> tuple[list[dict[str, str]], int]:
    """Pictures that something is missing of, each with what is stored about it, and the number of the others."""
    rows: list[dict[str, str]] = []
    steps, views = named_steps(recipe, compute), PictureViews()
    for source in sources:
        stored: list[Row] = []
        done = follow(source, steps, views, _noting(stores, stored), frozenset())
        if done.waiting:
            rows.append({"picture": json.dumps({"source": dataclasses.asdict(source), "stored": stored})})
    return rows, len(sources) - len(rows)


def _noting(stores: dict[str, StepStore], noted: list[Row]) -> Stored:
    """Looks results up and notes those that are there."""

    def look_up(step: str, key: str) -> list[Any] | None:
        out = stores[step].get(key)
        if out is not None:
            noted.append((step, key, out))
        return out

    return look_up


@contextmanager
def _ray(recipe: DistillRecipe) -> Iterator[Any]:
    """Ray, started for this run unless it runs already; it reports nowhere and shows no dashboard."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            "The engine ray needs Ray Data: pip install 'qzoom[ray]', or use --engine inprocess."
        ) from error
    own = not ray.is_initialized()
    if own:
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        if recipe.ray.address:
            options = {"address": recipe.ray.address, "log_to_driver": False, "logging_level": "error"}
        else:
            options["num_cpus"] = recipe.ray.actors + 1
        try:
            ray.init(**options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray did not start ({' '.join(str(error).split())[:200]}).") from error
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
