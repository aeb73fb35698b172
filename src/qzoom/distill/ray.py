"""The same steps on Ray Data, from this machine to a cluster.

Ray's processes do not write: each takes an image with its stored results through the steps, and the driver stores what
comes back. The cache of paid calls is one file; on a cluster the folder must be visible to all machines.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qzoom.cluster import ray_data, ray_running
from qzoom.distill.items import Item
from qzoom.distill.pictures import ImageSource, Views
from qzoom.distill.pipeline import SCAN, Advance, Row, Stored, make_steps, process_picture
from qzoom.distill.recipe import DatasetRecipe
from qzoom.distill.roles import CACHE, build_roles
from qzoom.errors import LaterError, QZoomError, StopRunError
from qzoom.settings import from_mapping, to_dict
from qzoom.store.log import Log
from qzoom.store.schema import from_values


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
    with ray_running(recipe.ray.address, recipe.ray.actors + 1, ", or use --engine inprocess") as ray:
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
            self._steps = make_steps(recipe, self._views, roles)
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
            result = process_picture(source, self._steps, self._views, lambda *at: stored.get(at))
        except QZoomError as error:
            return json.dumps({"stop": str(error)})
        return json.dumps({"rows": result.rows})


def _missing(recipe: DatasetRecipe, sources: Sequence[ImageSource], stores: Mapping[str, Log]) -> list[dict[str, str]]:
    """Images whose results are not complete, each with its stored results."""

    def not_yet(item: Item) -> Sequence[Item]:
        raise LaterError("a step has not been run")

    rows: list[dict[str, str]] = []
    steps, views = dict.fromkeys(recipe.steps, not_yet), Views()
    for source in sources:
        stored: list[Row] = []
        complete = source.key in stores[SCAN]
        if complete:
            complete = not process_picture(source, steps, views, _recording(stores, stored)).waiting
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
