"""The folder of a training run: `state.safetensors` to go on from, `training_curve.jsonl`, the exported `model`, and a
lock that one training at a time holds.

A run is only gone on with by a recipe that trains the same way. Its stages may change, since a run is prolonged by
editing them, and so may folders, proposed boxes, measuring, number format and batches; the rest may not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qzoom.checkpoints.writing import tidy_folder
from qzoom.errors import CheckpointError, ConfigError
from qzoom.settings import to_dict
from qzoom.store.log import open_locked, write_atomic
from qzoom.training.run import check_same_run, without
from tiny.checkpoint import writing
from tiny.pack import Pack
from tiny.recipe import Recipe

STATE_FILE = "state.safetensors"
CURVE_FILE = "training_curve.jsonl"
MODEL_FOLDER = "model"
LOCK_FILE = "training.lock"

_MAY_CHANGE = (
    "stages", "packs", "pack_counts", "receipts", "proposals", "start_from", "evaluate", "evaluate_examples",
    "evaluate_minutes", "export_minutes", "checkpoint_minutes", "batch_positions", "bf16",
)  # fmt: skip


@contextlib.contextmanager
def training_in(folder: Path, *, fresh: bool = False) -> Iterator[None]:
    """Hold the folder's lock, remove what killed trainings left half written and, if `fresh`, the earlier run.

    Raises:
        ConfigError: another process trains there, or there is a curve or a model without a state.
        DataError: the folder cannot be written.
    """
    try:
        lock = open_locked(folder / LOCK_FILE)
    except ConfigError as error:
        raise ConfigError(f"Another process trains in {folder}; wait for it, or name another folder.") from error
    with lock:
        _tidy(folder)
        if fresh:
            for name in (STATE_FILE, CURVE_FILE):
                (folder / name).unlink(missing_ok=True)
        elif not (folder / STATE_FILE).is_file():
            _refuse_left_overs(folder)
        yield


def _tidy(folder: Path) -> None:
    """Remove half-written files; a model that was moved aside comes back if no other took its place."""
    for path in (*folder.glob(f"{STATE_FILE}.*.partial"), *folder.glob(f"{CURVE_FILE}.*.partial")):
        path.unlink(missing_ok=True)
    tidy_folder(folder / MODEL_FOLDER)


def _refuse_left_overs(folder: Path) -> None:
    found = [name for name in (CURVE_FILE, MODEL_FOLDER) if (folder / name).exists()]
    if found:
        raise ConfigError(
            f"{folder} holds a {found[0]} but no {STATE_FILE} to go on from; use --fresh to replace it, or name "
            "another folder."
        )


def require_state(folder: Path) -> None:
    """Refuse to measure where nothing was trained yet (ConfigError)."""
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(f"{folder} holds no {STATE_FILE} to measure; train there first, or name another folder.")


def run_settings(recipe: Recipe, packs: Mapping[str, Pack]) -> dict[str, Any]:
    """What decides the weights of a run beside its stages, as JSON values."""
    settings = without(to_dict(recipe), _MAY_CHANGE)
    settings["start_from"] = None if recipe.start_from is None else _digest(Path(recipe.start_from))
    settings["packs"] = {name: asdict(pack.header) for name, pack in packs.items()}
    return settings


def check_same_settings(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run of other settings (ConfigError: it names them). Those that only one side has, such as
    the packs of another stage, do not count; a state of an earlier version has none."""
    check_same_run(_shared(there, here), _shared(here, there), folder)


def _shared(values: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _shared(value, other[name]) if isinstance(value, dict) and isinstance(other[name], dict) else value
        for name, value in values.items()
        if name in other
    }


def _digest(model: Path) -> str:
    with (model / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def append_to_curve(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry on a line of its own, also after one that was cut short (CheckpointError: the disk refuses)."""
    line = json.dumps(entry).encode() + b"\n"
    with writing(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read() == b"\n" else b"\n" + line
        file.write(line)


def cut_curve(path: Path, step: int) -> None:
    """Drop the curve's entries after a step, and damaged ones: a run that was killed takes those steps again
    (CheckpointError: the disk refuses)."""
    if not path.is_file():
        return
    kept = [entry for entry in curve_entries(path) if entry["step"] <= step]
    with writing(path):
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def curve_entries(path: Path) -> list[dict[str, Any]]:
    """The curve's complete entries in order, none where there is no curve (CheckpointError: it cannot be read)."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); check its rights.") from error
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
