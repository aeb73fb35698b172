"""Folders that are either completely written or not there: everything goes into a hidden neighbour first.

A mount point, which cannot be moved, has its hidden folder inside; so has a base model that an adapter is added to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qzoom.checkpoints.base import PROCESSOR_FILES
from qzoom.checkpoints.format import CONFIG_FILE, Kind, detect_kind
from qzoom.checkpoints.lora import LORA_FOLDER
from qzoom.errors import CheckpointError, reason_of

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_SIDE = (".json", ".jinja", ".txt", ".model", ".md")
_PART = ".part-"
_CONFIGS = ("config.json", CONFIG_FILE)  # what makes a folder a checkpoint, ours last


def check_target(folder: Path, kind: Kind) -> None:
    """Refuse to write a checkpoint over something else (CheckpointError: a file, or a folder with anything else in it).
    `folder`: new, empty, or a checkpoint of the same kind, which will be replaced."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder to write to.")
    if not folder.is_dir() or all(
        path.name == "lost+found" or path.name.startswith(_PART) for path in folder.iterdir()
    ):
        return
    found = detect_kind(folder)
    if found != kind:
        what = f"a checkpoint of another kind ({found})" if found else "other files"
        raise CheckpointError(f"{folder} holds {what}; choose a new or empty folder.")


@contextlib.contextmanager
def atomic_folder(folder: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends well, and vanishes when it does not.

    Files of an earlier checkpoint there are replaced; others, such as a README, stay. A link stays one, and what it
    leads to is written. In a mount point the files change places one by one.

    Raises:
        CheckpointError: the target cannot be used (see `check_target`) or cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(os.path.realpath(folder))
    check_target(folder, kind)
    fixed = os.path.ismount(folder)
    part = folder / f"{_PART}{os.getpid()}" if fixed else folder.with_name(f".{folder.name}{_PART}{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if fixed:
            _exchange(part, folder, _is_replaced)
        else:
            _swap(part, folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def added_files(folder: Path, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write into whose files are put into `folder`, beside what is there, when the block ends well.

    Args:
        replaced: whether a file of this name goes away; files with new ones of their name do anyway.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from safetensors import SafetensorError

    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PART) as part:
            yield Path(part)
            _exchange(Path(part), folder, replaced)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


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


def _is_replaced(name: str) -> bool:
    """Whether a file of an earlier checkpoint goes away when a new one is written."""
    return name in (*PROCESSOR_FILES, "generation_config.json") or _is_model_file(name)


def _unwritable(folder: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or reason_of(error)
    return CheckpointError(f"{folder} cannot be written ({reason}); check space and rights.")


def _exchange(part: Path, folder: Path, replaced: Callable[[str], bool]) -> None:
    """Put what `part`, a folder in `folder`, holds in the place of what is there.

    What makes the folder a checkpoint goes first and comes last, so that a killed process leaves no mixture; after an
    error everything is where it was.
    """

    def order(path: Path) -> int:
        return _CONFIGS.index(path.name) if path.name in _CONFIGS else -1

    new, old = sorted(part.iterdir(), key=order), part / ".old"
    names = {path.name for path in new}
    gone = [path for path in folder.iterdir() if path != part and (path.name in names or replaced(path.name))]
    moves = [(path, old / path.name) for path in sorted(gone, key=order, reverse=True)]
    moves += [(path, folder / path.name) for path in new]
    done = []
    try:
        old.mkdir()
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


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
            if not _is_replaced(path.name) and not (folder / path.name).exists():
                path.rename(folder / path.name)
        shutil.rmtree(old, ignore_errors=True)
