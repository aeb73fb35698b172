"""Folders that are either completely written or not there: everything goes into a hidden neighbour first."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from qzoom.checkpoints.base import PROCESSOR_FILES
from qzoom.checkpoints.format import CONFIG_FILE, Kind, detect_kind
from qzoom.checkpoints.lora import LORA_FOLDER
from qzoom.errors import CheckpointError, reason_of

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_SIDE = (".json", ".jinja", ".txt", ".model", ".md")


def check_target(folder: Path, kind: Kind) -> None:
    """Refuse to write a checkpoint over something else (CheckpointError: a file, or a folder with anything else in it).
    `folder`: new, empty, or a checkpoint of the same kind, which will be replaced."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder to write to.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    found = detect_kind(folder)
    if found != kind:
        what = f"a checkpoint of another kind ({found})" if found else "other files"
        raise CheckpointError(f"{folder} holds {what}; choose a new or empty folder.")


@contextlib.contextmanager
def atomic_folder(folder: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends well, and vanishes when it does not.

    Files of an earlier checkpoint there are replaced; others, such as a README, stay.

    Raises:
        CheckpointError: the target cannot be used (see `check_target`) or cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(os.path.abspath(folder))
    check_target(folder, kind)
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        _swap(part, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise CheckpointError(f"{folder} cannot be written ({reason}); check space and rights.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tidy_folder(folder: Path) -> None:
    """Remove what killed processes left of `atomic_folder`; a folder that was moved aside comes back if no other took
    its place. Only while nobody writes there."""
    for old in folder.parent.glob(f".{folder.name}.old-*"):
        if not folder.exists():
            old.rename(folder)
    for pattern in ("part", "old"):
        for path in folder.parent.glob(f".{folder.name}.{pattern}-*"):
            shutil.rmtree(path, ignore_errors=True)


def copy_side_files(source: Path, target: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy what belongs to a checkpoint beside weights and config: tokenizer, templates, cards, licences."""
    for path in sorted(source.iterdir()):
        side = path.name.endswith(_SIDE) or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if path.is_file() and side and not _is_model_file(path.name) and wanted(path.name):
            shutil.copyfile(path, target / path.name)


def _is_model_file(name: str) -> bool:
    return name in (LORA_FOLDER, "config.json", CONFIG_FILE) or name.endswith(_WEIGHTS)


def _swap(part: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    if old.is_dir():
        for path in old.iterdir():
            replaced = path.name in (*PROCESSOR_FILES, "generation_config.json") or _is_model_file(path.name)
            if not replaced and not (folder / path.name).exists():
                path.rename(folder / path.name)
        shutil.rmtree(old, ignore_errors=True)
