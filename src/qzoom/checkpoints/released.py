"""Models in their authors' own layout: which stored tensor is which of transformers', and what comes from elsewhere.

A released checkpoint may leave its vision tower in a folder of its own, and one as it was trained holds only the layers
that were needed for that. What is missing is taken from the tower's folder and from a base of the same family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.branches import layer_count
from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.upstream import base_of
from qzoom.checkpoints.weights import Place, WeightIndex, read_index, read_json, read_places
from qzoom.errors import CheckpointError, listed

if TYPE_CHECKING:
    from torch import Tensor

    from qzoom.backbones.base import ReleasedLayout


def stock_places(
    folder: Path, settings: Mapping[str, Any], layout: ReleasedLayout, *, base: str | None = None
) -> tuple[Any, dict[str, Place]]:
    """transformers' config of a released model, and where each of its tensors is stored, by transformers' name.

    Args:
        base: hub id or folder of a complete model of the family, for what is missing; None: the one that a published
            checkpoint is known to need.

    Raises:
        CheckpointError: a tower that cannot be had, or half a model without a base.
    """
    index = read_index(folder)
    places = _places(index, index.tensors, layout)
    base = base or base_of(str(folder))
    tower: Mapping[str, Any] | None = None
    own = tower_folder(folder, str(settings.get(layout.tower_setting)))
    if any(name.startswith(layout.tower) for name in places):
        tower = None if own is None else read_json(own / "config.json")
    else:
        tower, found = _tower(folder, settings, layout, base)
        places |= {name: place for name, place in found.items() if name not in places}
    config = layout.config(settings, tower)
    needed = set(empty_model(config).state_dict())
    if needed - places.keys():
        if base is None:
            raise CheckpointError(_half(folder, places, needed - places.keys(), config))
        other = read_index(find_source(base).folder)
        places |= {name: place for name, place in _places(other, other.tensors, layout).items() if name not in places}
    return config, {name: places[name] for name in needed if name in places}


def read_stock(config: Any, layout: ReleasedLayout, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors by transformers' names; tables of a base that has more tokens are cut."""
    out = read_places(places)
    rows = config.get_text_config().vocab_size
    return out | {name: out[name][:rows] for name in layout.table if name in out}


def empty_model(config: Any) -> Any:
    """A model of a config without storage."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _places(index: WeightIndex, names: Iterable[str], layout: ReleasedLayout) -> dict[str, Place]:
    known = ((layout.stock_name(name), name) for name in names)
    return {new: (index, old) for new, old in known if new is not None}


def _tower(
    folder: Path, settings: Mapping[str, Any], layout: ReleasedLayout, base: str | None
) -> tuple[Mapping[str, Any] | None, dict[str, Place]]:
    """The vision tower's config.json and tensors, from where the checkpoint says, else nothing (the base has them)."""
    name = str(settings.get(layout.tower_setting))
    place = tower_folder(folder, name)
    try:
        source = place or find_source(name).folder
        index = read_index(source)
        return read_json(source / "config.json"), _places(index, index.tensors, layout)
    except CheckpointError as error:
        if base is not None:
            return None, {}
        raise CheckpointError(
            f"{folder} leaves its vision tower to {layout.tower_setting} {name!r}, which cannot be read: {error} Or "
            f"take it from a complete model of the family: qzoom convert {folder} FOLDER --base MODEL."
        ) from error


def tower_folder(folder: Path, name: str) -> Path | None:
    """The local folder of a vision tower; relative names start at the checkpoint's. None: it is on the hub."""
    place = (folder / Path(name).expanduser()).resolve()
    return place if place.is_dir() else None


def _half(folder: Path, places: Mapping[str, Place], missing: Iterable[str], config: Any) -> str:
    total = config.get_text_config().num_hidden_layers
    names = [name[name.index("layers.") :] for name in places if ".layers." in name and "vision" not in name]
    held, lacking = layer_count(names), sorted(missing)
    if held < total:
        return (
            f"{folder} holds {held} of {total} decoder layers: it is half a model, as its authors' training leaves it; "
            f"fill in the rest from its base: qzoom convert {folder} FOLDER --base BASE."
        )
    return f"The weights in {folder} lack {listed(lacking)}; fetch all weight files again."
