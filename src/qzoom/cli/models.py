"""`qzoom models`, `qzoom recipes` and `qzoom recipes copy`: what can be loaded, and settings to begin with."""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli.console import Console
from qzoom.cli.options import Json

if TYPE_CHECKING:
    from qzoom.backbones.base import ModelSizes

_BRANCH_LAYERS = 6  # of gate and region branch together, in all released checkpoints
_BYTES = 2  # of a weight in bfloat16


def models(*, json: Json = False) -> None:
    """List the model ids that work, whether they zoom, and the memory that their weights need.

    Any folder or hub id of the same families works too. "here" says whether the weights are on this machine.

    Example: qzoom models
    """
    from qzoom.backbones.registry import published_sizes
    from qzoom.checkpoints.upstream import UPSTREAM_PRESETS

    sizes = published_sizes()
    rows: list[dict[str, Any]] = [
        {"id": "tiny", "zooms": True, "gigabytes": 0.02, "here": True, "note": "embedded; for trying out"}
    ]
    for name in UPSTREAM_PRESETS:
        own = next(own for base, own in sizes.items() if _letters(base) in _letters(name))
        rows.append(_row(name, _weights(own) + _BRANCH_LAYERS * own.layer, zooms=True, note="the authors' checkpoint"))
    rows += [_row(name, _weights(own), zooms=False, note="base; train heads for it") for name, own in sizes.items()]
    console = Console()
    if json:
        console.record({"models": rows})
        return
    width = max(len(str(row["id"])) for row in rows)
    console.result(f"{'id':<{width}}  zooms  GB in bfloat16  here  note")
    for row in rows:
        zooms, here = ("yes" if row[name] else "no" for name in ("zooms", "here"))
        console.result(f"{row['id']:<{width}}  {zooms:<5}  {row['gigabytes']:>14}  {here:<4}  {row['note']}")


def _letters(name: str) -> str:
    """What the name of a base and that of a checkpoint made of it share: family, version and size."""
    last = name.rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-hf").replace("-v1.5", "-1.5")
    return "".join(letter for letter in last if letter.isalnum())


def _weights(own: ModelSizes) -> int:
    return own.layers * own.layer + own.table * (1 if own.tied else 2) + own.vision


def _row(name: str, weights: int, *, zooms: bool, note: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    here = isinstance(try_to_load_from_cache(name, "config.json"), str)
    return {"id": name, "zooms": zooms, "gigabytes": round(_BYTES * weights / 1e9, 1), "here": here, "note": note}


def recipes(*, json: Json = False) -> None:
    """List the recipes that come with qzoom, each with the command that runs it.

    Example: qzoom recipes
    """
    console = Console()
    found = [(name, command) for name, _, command in _recipes()]
    if json:
        console.record({"recipes": [{"name": name, "command": command} for name, command in found]})
        return
    width = max(len(name) for name, _ in found)
    for name, command in found:
        console.result(f"{name:<{width}}  {command}")


def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="As `qzoom recipes` lists it.")],
    target: Annotated[
        Path | None, typer.Argument(show_default=False, help="File or folder; recipes/NAME.yaml if not given.")
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy a recipe, to edit it and to run it.

    Example: qzoom recipes copy qwen3-vl-4b/regions
    """
    from qzoom.settings import closest

    table = {name: file for name, file, _ in _recipes()}
    known = name.removeprefix("recipes/").removesuffix(".yaml")
    if known not in table:
        hint = closest(known, list(table)).replace("known keys", "the recipes are")
        raise typer.BadParameter(f"there is no recipe {name!r}; {hint}", param_hint="NAME")
    place = target or Path("recipes", f"{known}.yaml")
    place = place / f"{Path(known).name}.yaml" if place.is_dir() else place
    if place.exists() and not force:
        raise typer.BadParameter(f"{str(place)!r} exists; give another place, or --force.", param_hint="TARGET")
    place.parent.mkdir(parents=True, exist_ok=True)
    with importlib.resources.as_file(table[known]) as source:
        shutil.copyfile(source, place)
    Console().result(str(place))


def _recipes() -> Iterator[tuple[str, Traversable, str]]:
    """Names such as "qwen3-vl-4b/regions", files and commands: in the installed package, else in the checkout, whose
    own programs run some of them."""
    package = importlib.resources.files("qzoom")
    root = package / "recipes"
    installed = root.is_dir()
    if not installed:
        root = Path(str(package)).parents[1] / "recipes"
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if file.name.endswith(".yaml"):
                command = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()
                if not (installed and command.startswith("python ")):
                    yield f"{folder.name}/{file.name.removesuffix('.yaml')}", file, command
