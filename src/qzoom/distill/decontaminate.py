"""Leakage audit: are pictures of a benchmark among the training pictures, even resized, re-encoded or mirrored?

Two perceptual hashes are compared (pHash and dHash of 64 bits, imagehash). A pair counts when both lie within their
distances, so that pages of one layout or plain backgrounds do not fill the report by one hash alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qzoom.config import check_count
from qzoom.errors import ConfigError, ImageError

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["AuditReport", "AuditSettings", "Benchmark", "Match", "audit_dataset", "picture_hashes", "read_pictures"]


_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What is compared and what counts.

    Args:
        against: folders of pictures, or Parquet files with pictures.
        phash: most differing bits of pHash.
        dhash: most differing bits of dHash.
        flips: also compare mirrored pictures.
        drop: leave pictures that are found out of the exported data.
    """

    against: tuple[str, ...] = ()
    phash: int = 8
    dhash: int = 8
    flips: bool = True
    drop: bool = True

    def __post_init__(self) -> None:
        check_count(self, "phash", 0, 64)
        check_count(self, "dhash", 0, 64)


@dataclass(frozen=True, slots=True)
class Match:
    """A training picture that looks like one of a benchmark.

    Args:
        picture: the training picture.
        benchmark: the benchmark's picture.
        phash: differing bits of pHash.
        dhash: differing bits of dHash.
        mirrored: whether it was found mirrored.
    """

    picture: str
    benchmark: str
    phash: int
    dhash: int
    mirrored: bool


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What was compared and found.

    Args:
        pictures: training pictures.
        benchmark_pictures: those they were compared with.
        unreadable: pictures that could not be decoded.
        matches: the nearest benchmark picture of every training picture that has one within the distances.
    """

    pictures: int
    benchmark_pictures: int
    unreadable: int
    matches: tuple[Match, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class Benchmark:
    """Hashes of benchmark pictures, sixteen bytes a picture and its name.

    Args:
        settings: what is compared.

    Raises:
        ConfigError: something in `against` is neither a folder nor a Parquet file, or holds no picture.
    """

    def __init__(self, settings: AuditSettings) -> None:
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
                raise ConfigError(f"audit: {place} holds no picture that can be read; name a folder or Parquet file.")
        self.names = names
        self._hashes = np.array(hashes, np.uint64).reshape(len(hashes), 2)

    def nearest(self, image: PIL.Image.Image, name: str) -> Match | None:
        """The benchmark picture that a picture looks like; None within the distances."""
        from PIL import ImageOps

        best: Match | None = None
        for mirrored in (False, True) if self.settings.flips else (False,):
            found = self._nearest(picture_hashes(ImageOps.mirror(image) if mirrored else image), name, mirrored)
            if found is not None and (best is None or found.phash + found.dhash < best.phash + best.dhash):
                best = found
        return best

    def _nearest(self, hashes: tuple[int, int], name: str, mirrored: bool) -> Match | None:
        if not self.names:
            return None
        bits = np.bitwise_count(self._hashes ^ np.array(hashes, np.uint64)).astype(int)
        close = (bits[:, 0] <= self.settings.phash) & (bits[:, 1] <= self.settings.dhash)
        if not close.any():
            return None
        at = int(np.where(close, bits.sum(axis=1), 1000).argmin())
        return Match(name, self.names[at], int(bits[at, 0]), int(bits[at, 1]), mirrored)


def picture_hashes(image: PIL.Image.Image) -> tuple[int, int]:
    """pHash and dHash of a picture as whole numbers of 64 bits."""
    import imagehash

    small = image.convert("L")
    small.thumbnail((512, 512))
    return int(str(imagehash.phash(small)), 16), int(str(imagehash.dhash(small)), 16)


def read_pictures(place: Path) -> Iterator[tuple[str, PIL.Image.Image | None]]:
    """Names and pictures of a folder (with folders in it) or of a Parquet file; None for one that cannot be decoded.

    A Parquet file may hold pictures in any column, as bytes, as {bytes, path}, or as lists of those.

    Raises:
        ConfigError: neither a folder nor a Parquet file.
    """
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                yield str(path.relative_to(place)), _decoded(path)
            elif path.suffix.lower() == ".parquet" and path.is_file():
                yield from _of_parquet(path)
    elif place.is_file():
        yield from _of_parquet(place)
    else:
        raise ConfigError(f"audit: {place} is neither a folder nor a Parquet file; name the benchmark's pictures.")


def audit_dataset(folder: Path, settings: AuditSettings) -> AuditReport:
    """Compare the pictures of an exported data set with benchmarks.

    Args:
        folder: with the Parquet files that `qzoom distill` wrote, or any folder of pictures.
        settings: what is compared.

    Raises:
        ConfigError: nothing to compare, or a place that cannot be read.
    """
    if not settings.against:
        raise ConfigError("audit: nothing to compare with; name folders or Parquet files with --against.")
    benchmark = Benchmark(settings)
    seen: set[str] = set()
    matches: list[Match] = []
    unreadable = benchmark.unreadable
    for name, image in read_pictures(folder):
        if name in seen:
            continue
        seen.add(name)
        if image is None:
            unreadable += 1
            continue
        match = benchmark.nearest(image, name)
        if match is not None:
            matches.append(match)
    if not seen:
        raise ConfigError(f"audit: {folder} holds no pictures; name the folder that `qzoom distill` wrote.")
    return AuditReport(len(seen), len(benchmark.names), unreadable, tuple(matches))


def _of_parquet(path: Path) -> Iterator[tuple[str, PIL.Image.Image | None]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowInvalid

    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"audit: {path} is not a Parquet file ({' '.join(str(error).split())[:200]}).") from error
    with file:
        row = 0
        for batch in file.iter_batches(batch_size=16):
            for values in batch.to_pylist():
                for number, (name, data) in enumerate(_pictures_in(values.values())):
                    yield name or f"{path.name}, row {row}, picture {number}", _decoded(data)
                row += 1


def _pictures_in(values: Iterable[Any]) -> Iterator[tuple[str, bytes | Path]]:
    for value in values:
        if isinstance(value, bytes):
            yield "", value
        elif isinstance(value, dict) and {"bytes", "path"} <= set(value):
            if value["bytes"]:
                yield value["path"] or "", value["bytes"]
            elif value["path"]:
                yield value["path"], Path(value["path"])
        elif isinstance(value, list):
            yield from _pictures_in(value)


def _decoded(source: bytes | Path) -> PIL.Image.Image | None:
    from qzoom.images.load import load_image

    try:
        return load_image(io.BytesIO(source) if isinstance(source, bytes) else source).image
    except ImageError:
        return None
