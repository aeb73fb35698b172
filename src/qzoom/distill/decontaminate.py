"""Decontamination: are images of a benchmark among the training images, even resized, re-encoded or mirrored?

Two perceptual hashes are compared (pHash and dHash of 64 bits, imagehash). A pair counts when both lie within their
distances, so that pages of one layout or plain backgrounds do not fill the report by one hash alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
from PIL import ImageOps

from qzoom.data.benchmarks.table import picture_source
from qzoom.distill.pictures import EXTENSIONS
from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.images.load import load_image, picture_digest
from qzoom.settings import Between, settings

_BASE64_STARTS = ("/9j/", "iVBORw0K", "UklGR", "R0lGOD", "Qk0", "SUkq", "TU0A")
"""The first characters of JPEG, PNG, WebP, GIF, BMP and TIFF in base64."""


@settings
class DecontaminateSettings:
    """What is compared, and what counts as a match."""

    against: tuple[str, ...] = ()
    """Benchmarks: folders of images or of what `qzoom eval --data` reads, or single files of these kinds."""
    phash: Annotated[int, Between(0, 64)] = 8
    """Most differing bits of pHash."""
    dhash: Annotated[int, Between(0, 64)] = 8
    """Most differing bits of dHash."""
    flips: bool = True
    """Also compare mirrored images."""
    drop: bool = True
    """Leave matching images out of the exported data."""


@dataclass(frozen=True, slots=True)
class Match:
    """A training image that looks like one of a benchmark."""

    picture: str  # the training image
    benchmark: str  # the benchmark's image
    phash: int  # differing bits of pHash
    dhash: int  # differing bits of dHash
    mirrored: bool  # whether the mirrored image matches


@dataclass(frozen=True, slots=True)
class DecontaminateReport:
    """Result of a comparison."""

    pictures: int  # number of training images; equal pixels count once
    benchmark_pictures: int  # number of images they were compared with
    unreadable: int  # number of images that could not be decoded
    matches: tuple[Match, ...]  # the nearest benchmark image of every training image that has one within the distances


class BenchmarkHashes:
    """Hashes of benchmark images: sixteen bytes and a name each (ConfigError: an entry of `against` cannot be read, or
    holds no image)."""

    def __init__(self, settings: DecontaminateSettings) -> None:
        self.settings = settings
        self.unreadable = 0
        names: list[str] = []
        hashes: list[tuple[int, int]] = []
        for place in settings.against:
            before = len(names)
            for name, image in read_pictures(Path(place)):
                if image is None:
                    self.unreadable += 1
                    continue
                names.append(name)
                hashes.append(picture_hashes(image))
            if len(names) == before:
                raise ConfigError(
                    f"decontaminate: {place} holds no image that can be read; name a folder of images, or what "
                    "`qzoom eval --data` reads."
                )
        self.names = names
        self._hashes = np.array(hashes, np.uint64).reshape(len(hashes), 2)

    def nearest(self, image: PIL.Image.Image, name: str) -> Match | None:
        """The nearest benchmark image within the distances; None without one."""
        best: Match | None = None
        for mirrored in (False, True) if self.settings.flips else (False,):
            hashes = picture_hashes(ImageOps.mirror(image) if mirrored else image)
            bits = np.bitwise_count(self._hashes ^ np.array(hashes, np.uint64)).astype(int)
            close = (bits[:, 0] <= self.settings.phash) & (bits[:, 1] <= self.settings.dhash)
            if close.any():
                at = int(np.where(close, bits.sum(axis=1), 1000).argmin())
                phash, dhash = map(int, bits[at])
                if best is None or phash + dhash < best.phash + best.dhash:
                    best = Match(name, self.names[at], phash, dhash, mirrored)
        return best


def picture_hashes(image: PIL.Image.Image) -> tuple[int, int]:
    """pHash and dHash of an image as integers of 64 bits."""
    import imagehash

    small = image.convert("L")
    small.thumbnail((512, 512))
    return int(str(imagehash.phash(small)), 16), int(str(imagehash.dhash(small)), 16)


def read_pictures(place: Path) -> Iterator[tuple[str, PIL.Image.Image | None]]:
    """Names and images of a folder (with its subfolders) or of a file; None for an image that cannot be decoded. In a
    table, the name is that of the table and the image's path or row there.

    Parquet, JSON Lines and Arrow files may hold images in any column: as bytes, as {bytes, path}, as base64 or data
    URL, as paths that start from their folder, or as lists of these (ConfigError: neither a folder nor a file of these
    kinds).
    """
    if not place.exists():
        raise ConfigError(f"decontaminate: {place} does not exist; name the benchmark's folder or file.")
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    for path in files:
        suffix = path.suffix.lower()
        if suffix in EXTENSIONS:
            yield str(path.relative_to(place)) if path != place else path.name, _decoded(path)
        elif suffix in _TABLES:
            table = str(path.relative_to(place)) if path != place else path.name
            yield from _of_table(table, path.parent, _TABLES[suffix](path))
        elif path == place:
            raise ConfigError(
                f"decontaminate: {place} is neither a folder nor an image, Parquet, JSON Lines or Arrow file; name the "
                "benchmark's images."
            )


def decontaminate(folder: Path, settings: DecontaminateSettings) -> DecontaminateReport:
    """Compare the images of a data set of `qzoom distill`, or of any folder of pictures, with benchmarks (ConfigError:
    nothing to compare, or a file that cannot be read)."""
    if not settings.against:
        raise ConfigError("decontaminate: nothing to compare with; name folders or Parquet files with --against.")
    benchmark = BenchmarkHashes(settings)
    seen: set[str] = set()
    matches: list[Match] = []
    unreadable = benchmark.unreadable
    for name, image in read_pictures(folder):
        content = name if image is None else picture_digest(image)  # names may repeat, in shards for example
        if content in seen:
            continue
        seen.add(content)
        if image is None:
            unreadable += 1
            continue
        match = benchmark.nearest(image, name)
        if match is not None:
            matches.append(match)
    if not seen:
        raise ConfigError(f"decontaminate: {folder} holds no images; name the folder that `qzoom distill` wrote.")
    return DecontaminateReport(len(seen), len(benchmark.names), unreadable, tuple(matches))


def _of_table(table: str, folder: Path, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, PIL.Image.Image | None]]:
    for number, row in enumerate(rows):
        for count, (name, data) in enumerate(_pictures_in(row.values(), folder)):
            yield f"{table}: {name}" if name else f"{table}, row {number}, picture {count}", _decoded(data)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowInvalid

    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error
    with file:
        for batch in file.iter_batches(batch_size=16):
            yield from batch.to_pylist()


def _arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that `save_to_disk` of `datasets` wrote."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                for start in range(0, batch.num_rows, 16):
                    yield from batch.slice(start, 16).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, "Arrow", error) from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise _unreadable(path, "JSON Lines", f"line {number}: {error}") from error
            if isinstance(row, dict):
                yield row


_TABLES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".jsonl": _json_rows,
}


def _unreadable(path: Path, kind: str, error: object) -> ConfigError:
    return ConfigError(f"decontaminate: {path} is not a {kind} file ({' '.join(str(error).split())[:200]}).")


def _pictures_in(values: Iterable[Any], folder: Path) -> Iterator[tuple[str, bytes | Path]]:
    for value in values:
        if isinstance(value, bytes):
            yield "", value
        elif isinstance(value, dict) and ({"bytes", "path"} & set(value)):
            if value.get("bytes"):
                yield value.get("path") or "", value["bytes"]
            elif value.get("path"):
                yield value["path"], folder / value["path"]
        elif isinstance(value, list):
            yield from _pictures_in(value, folder)
        elif isinstance(value, str) and _may_be_picture(value):
            try:
                source = picture_source(value, "", folder)
            except DataError:
                continue
            yield value if isinstance(source, Path) else "", source


def _may_be_picture(text: str) -> bool:
    """Whether a text may be the path of an image, a data URL or base64."""
    return text.startswith("data:image/") or text.lower().endswith(EXTENSIONS) or text[:8].startswith(_BASE64_STARTS)


def _decoded(source: bytes | Path) -> PIL.Image.Image | None:
    try:
        return load_image(io.BytesIO(source) if isinstance(source, bytes) else source).image
    except ImageError:
        return None
