"""A picture's bytes for the exported data: its own file where any reader sees what a person sees, else encoded anew.

The finished data as Parquet that trl trains on as it is, with EasyR1's and verl's columns beside.

    dataset/train.parquet, validation.parquet     one row a question, sorted by picture and id
    dataset/images/                               only when pictures are kept as files
    dataset/README.md                             the card

The picture in a row is the original one, upright and without a box: boxes are drawn when training needs them. The same
items give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qzoom.config import check_choice, check_count, check_range
from qzoom.distill.items import Item, Picture, choice_text
from qzoom.distill.pictures import load_source
from qzoom.errors import DataError
from qzoom.store.log import write_atomic

if TYPE_CHECKING:
    import pyarrow

__all__ = ["COLUMNS", "Encoded", "ExportSettings", "encode_picture", "split_of", "to_row", "write_dataset"]


_ORIENTATION_TAG = 0x0112
_PLAIN = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded picture.

    Args:
        data: its bytes; None when it lies in a file.
        path: the file, or a name by its digest.
    """

    data: bytes | None
    path: str


def encode_picture(
    picture: Picture, encoding: str = "png", quality: int = 95, images: tuple[Path, Path] | None = None
) -> Encoded:
    """The upright RGB picture as bytes.

    Args:
        picture: which.
        encoding: "png" or "jpeg", for pictures whose own file cannot be taken over.
        quality: of JPEG.
        images: write it to the first folder and name it as in the second; None gives the bytes.

    Raises:
        ImageError: the picture is missing or cannot be decoded.
    """
    data, suffix = _own_file(picture)
    if data is None:
        image = load_source(picture.source, picture.root).image
        buffer = io.BytesIO()
        if encoding == "jpeg":
            image.save(buffer, "JPEG", quality=quality)
        else:
            image.save(buffer, "PNG")
        data, suffix = buffer.getvalue(), "jpg" if encoding == "jpeg" else "png"
    name = f"{picture.digest}.{suffix}"
    if images is None:
        return Encoded(data, name)
    images[0].mkdir(exist_ok=True)
    (images[0] / name).write_bytes(data)
    return Encoded(None, str(images[1] / name))


def _own_file(picture: Picture) -> tuple[bytes | None, str]:
    """The file's bytes and suffix when it is a plain upright RGB picture."""
    from PIL import Image

    if not picture.root:
        return None, ""
    path = Path(picture.root) / picture.source
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=tuple(_PLAIN)) as image:
            upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1
            plain = image.mode == "RGB" and getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info
            known = image.size == (picture.width, picture.height)
            return (data, _PLAIN[str(image.format)]) if upright and plain and known else (None, "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None, ""


SPLITS = ("train", "validation")
COLUMNS = [
    "id",
    "images",
    "prompt",
    "completion",
    "answer",
    "problem",
    "data_source",
    "ability",
    "extra_info",
    "bbox",
    "bbox_norm",
    "choices",
    "letter",
    "style",
    "provenance",
    "verl_prompt",
    "reward_model",
]


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How rows are written.

    Args:
        form: "open" questions, "choice" (items without choices are left out), or "auto": choices where there are some.
        embed: pictures inside the Parquet files; else as files in `images`, named by path.
        encoding: of pictures whose own file cannot be taken over (turned, palette, drawn, ...).
        quality: of JPEG.
        validation: share of the pictures that is kept apart for validation.
        style: how training marks the box unless its recipe says otherwise.
        row_group: rows that are written, and read, together.

    Raises:
        ConfigError: a value out of range.
    """

    form: Literal["auto", "open", "choice"] = "auto"
    embed: bool = True
    encoding: Literal["png", "jpeg"] = "png"
    quality: int = 95
    validation: float = 0.05
    style: str = "rectangle"
    row_group: int = 32

    def __post_init__(self) -> None:
        from qzoom.data.overlay import STYLES

        check_choice(self, "form", ("auto", "open", "choice"))
        check_choice(self, "encoding", ("png", "jpeg"))
        check_choice(self, "style", STYLES)
        check_count(self, "quality", 1, 100)
        check_range(self, "validation", 0, 0.9)
        check_count(self, "row_group", 1, 10_000)


def split_of(picture: Picture, settings: ExportSettings) -> str:
    """The split of a picture, from its digest alone: all its questions are on one side, whatever else there is."""
    return SPLITS[int(picture.digest[:8], 16) / 2**32 < settings.validation]


def to_row(item: Item, picture: Encoded, settings: ExportSettings) -> dict[str, Any] | None:
    """An item as a row; None for one that has no row in the form that is wanted.

    Args:
        item: with region, question and answer.
        picture: the encoded picture.
        settings: of the export.

    Raises:
        DataError: a part is missing.
    """
    if item.region is None or item.asked is None or item.answer is None:
        raise DataError(f"The item {item.id} has no region, question or answer; run the steps before export first.")
    choices = item.choices if settings.form != "open" else None
    if choices is None and (settings.form == "choice" or _needs_options(item)):
        return None
    answer = item.answer.text if choices is None else choices.letter
    asked = item.asked.text if choices is None else choice_text(item.asked.text, choices.options)
    passed = item.difficulty
    return {
        "id": item.id,
        "images": [{"bytes": picture.data, "path": picture.path}],
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": answer}],
        "answer": answer,
        "problem": f"<image>{asked}",
        "data_source": _utf8(item.picture.dataset) or "distill",
        "ability": item.asked.kind,
        "extra_info": {
            "question": item.asked.text,
            "kind": item.asked.kind,
            "negative": item.asked.negative,
            "pair": item.asked.pair,
            "text": item.answer.text,
            "split": split_of(item.picture, settings),
            "area": item.region.area_share(item.picture),
            "area_bin": item.region.area_bin,
            "passes": None if passed is None else passed.passes,
            "samples": None if passed is None else passed.samples,
        },
        "bbox": list(item.region.box),
        "bbox_norm": list(item.region.normalised(item.picture)),
        "choices": None if choices is None else list(choices.options),
        "letter": "" if choices is None else choices.letter,
        "style": settings.style,
        "provenance": _utf8(_provenance(item)),
        "verl_prompt": [{"role": "user", "content": f"<image>{asked}"}],
        "reward_model": {"style": "rule", "ground_truth": answer},
    }


def _needs_options(item: Item) -> bool:
    """Whether the answer speaks of options, as that of a negative whose right option was taken out does."""
    from qzoom.distill.items import NONE_OPTION

    return (
        item.asked is not None and item.asked.negative and item.answer is not None and item.answer.text == NONE_OPTION
    )


def schema() -> pyarrow.Schema:
    """The columns, with what `datasets` needs to decode the pictures."""
    from datasets import Features, Image, List, Value

    text, whole = Value("string"), Value("int32")
    message = {"role": text, "content": text}
    extra = {
        "question": text,
        "kind": text,
        "negative": Value("bool"),
        "pair": text,
        "text": text,
        "split": text,
        "area": Value("float64"),
        "area_bin": whole,
        "passes": whole,
        "samples": whole,
    }
    kinds: dict[str, Any] = dict.fromkeys(COLUMNS, text)
    kinds |= {
        "images": List(Image()),
        "prompt": List(message),
        "completion": List(message),
        "extra_info": extra,
        "bbox": List(whole),
        "bbox_norm": List(Value("float64")),
        "choices": List(text),
        "verl_prompt": List(message),
        "reward_model": {"style": text, "ground_truth": text},
    }
    return Features(kinds).arrow_schema


def write_dataset(
    items: Iterator[Item],
    folder: Path,
    settings: ExportSettings,
    make_card: Callable[[dict[str, int]], str],
    drop: Callable[[Picture], bool] | None = None,
) -> dict[str, int]:
    """Write the Parquet files and the card; the folder appears complete or stays as it was.

    Args:
        items: kept ones, those of a picture one after the other, in the order of the rows.
        folder: of the data set; replaced.
        settings: of the export.
        make_card: the card's text from the rows of each split.
        drop: pictures that must not be there.

    Returns:
        Rows of each split.

    Raises:
        DataError: an item lacks a part, or the folder cannot be written.
        ImageError: a picture is gone.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts = _write_rows(items, partial, folder, settings, drop)
        write_atomic(partial / "README.md", make_card(counts).encode("utf-8", "replace"))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror or error}); check space and rights, then run again."
        ) from error
    return counts


def _write_rows(
    items: Iterator[Item],
    partial: Path,
    folder: Path,
    settings: ExportSettings,
    drop: Callable[[Picture], bool] | None,
) -> dict[str, int]:
    """All rows, `row_group` in memory at a time."""
    from pyarrow.parquet import ParquetWriter

    columns = schema()
    counts = dict.fromkeys(SPLITS, 0)
    waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    images = None if settings.embed else (partial / "images", folder.resolve() / "images")
    picture, encoded, dropped = "", None, False
    options: dict[str, Any] = {"compression": "snappy", "write_statistics": False}
    writers = {split: ParquetWriter(partial / f"{split}.parquet", columns, **options) for split in SPLITS}
    try:
        for item in items:
            if item.picture.digest != picture:
                picture = item.picture.digest
                dropped = drop is not None and drop(item.picture)
                encoded = None if dropped else encode_picture(item.picture, settings.encoding, settings.quality, images)
            row = None if encoded is None else to_row(item, encoded, settings)
            if row is None:
                continue
            split = row["extra_info"]["split"]
            counts[split] += 1
            waiting[split].append(row)
            if len(waiting[split]) == settings.row_group:
                _flush(writers[split], waiting[split], columns)
        for split in SPLITS:
            _flush(writers[split], waiting[split], columns)
    finally:
        for writer in writers.values():
            writer.close()
    return counts


def _flush(writer: Any, rows: list[dict[str, Any]], columns: pyarrow.Schema) -> None:
    import pyarrow as pa

    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=columns), row_group_size=len(rows))
        rows.clear()


def _utf8(text: str) -> str:
    """The text without what a file name that is no UTF-8 brings along."""
    return text.encode("utf-8", "replace").decode()


def _provenance(item: Item) -> str:
    """Where everything in a row comes from, as JSON."""
    region, asked, answer = item.region, item.asked, item.answer
    facts: dict[str, Any] = {
        "picture": {
            "digest": item.picture.digest,
            "source": item.picture.source,
            "dataset": item.picture.dataset,
            "size_px": [item.picture.width, item.picture.height],
        },
        "proposer": region.proposer if region else "",
        "phrase": region.phrase if region else "",
        "crop_box": list(region.crop_box) if region else [],
        "crop_scale": region.scale if region else 1.0,
        "asker": asked.asker if asked else "",
        "agreement": {"count": answer.count, "votes": answer.votes, "by": answer.by} if answer else {},
        "votes": [[vote.teacher, vote.sample, vote.status, vote.text] for vote in item.votes],
        "models": [list(pair) for pair in item.models],
        "seed": item.seed,
    }
    return json.dumps(facts, sort_keys=True, ensure_ascii=False)
