"""Open a benchmark's table through the `datasets` library: from the hub at a revision, or from a local folder.

A folder holds SPLIT.parquet, SPLIT-*.parquet (also below data/), SPLIT.jsonl, or what `save_to_disk` wrote; several
benchmarks in one folder lie in folders of their names. Pictures stay encoded until they are asked about.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.tasks.table import Benchmark, TableTask

__all__ = ["open_table"]


def open_table(
    benchmark: Benchmark, *, data: Path | None = None, split: str | None = None, revision: str | None = None
) -> TableTask:
    """The benchmark's table.

    Args:
        benchmark: which.
        data: folder of its files; None reads the hub.
        split: None for the benchmark's own.
        revision: branch, tag or commit of the dataset on the hub.

    Raises:
        ConfigError: the `datasets` library is missing, or a revision of files on disk.
        DataError: no such table.
    """
    split = split or benchmark.split
    if data is None:
        return _from_hub(benchmark, split, revision)
    if revision is not None:
        raise ConfigError("A data revision names a state of the hub; leave it out with a local folder.")
    for base in _bases(benchmark, data):
        files = _parquet(base, split)
        if files:
            rows = _load("parquet", str(base), data_files=[str(file) for file in files], split="train")
            return TableTask(benchmark, rows, base, _origin(files, split))
        lines = base / f"{split}.jsonl"
        if lines.is_file():
            return TableTask(benchmark, _read_lines(lines), base, _origin([lines], split))
        for saved in (base / split, base):
            if (saved / "state.json").is_file():
                return TableTask(benchmark, _from_disk(saved), base, _origin(sorted(saved.glob("*.arrow")), split))
    raise DataError(
        f"{data}: no table of {benchmark.name} with the split {split!r}; put {split}.parquet or {split}.jsonl into it "
        f"or into its folder {benchmark.name}."
    )


def _bases(benchmark: Benchmark, data: Path) -> list[Path]:
    own = data / benchmark.name
    bases = [own, data]
    if benchmark.config:
        bases = [own / benchmark.config, own, data / benchmark.config, data]
    return [base for base in bases if base.is_dir()]


def _parquet(base: Path, split: str) -> list[Path]:
    for folder in (base, base / "data"):
        whole = folder / f"{split}.parquet"
        files = [whole] if whole.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            return files
    return []


def _origin(files: list[Path], split: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"split": split, "sha256": digest.hexdigest()}


def _read_lines(path: Path) -> list[Any]:
    """One row a line; a line that is no object becomes the reason why."""
    rows: list[Any] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            row = f"line {number} of {path.name} is not JSON ({type(error).__name__}); mend or remove it."
        rows.append(row if isinstance(row, dict | str) else f"line {number} of {path.name} is no object.")
    if not rows:
        raise DataError(f"{path}: no rows in it; expected one JSON object a line.")
    return rows


def _from_hub(benchmark: Benchmark, split: str, revision: str | None) -> TableTask:
    rows = _load(benchmark.repo, benchmark.repo, name=benchmark.config, split=split, revision=revision)
    origin = {"source": benchmark.repo, "config": benchmark.config, "split": split, "revision": revision}
    return TableTask(benchmark, rows, None, origin | {"fingerprint": str(rows._fingerprint)})


def _load(path: str, shown: str, **how: Any) -> Any:
    datasets = _datasets()
    try:
        return _undecoded(datasets.load_dataset(path, **how))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"The table {shown!r} could not be opened ({type(error).__name__}: {reason:.200}); check its name, the "
            "split and the network, or name a local folder with --data."
        ) from error


def _from_disk(folder: Path) -> Any:
    try:
        return _undecoded(_datasets().load_from_disk(str(folder)))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{folder}: not a table that `datasets` saved ({reason:.200}).") from error


def _undecoded(table: Any) -> Any:
    """The table with its pictures as stored, so that one damaged picture spoils one row only."""
    datasets = _datasets()
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Benchmarks are read by the datasets library: pip install 'qzoom[eval]'.") from error
    return datasets
