"""The finished data as Parquet: trl's columns, and the same as a plain table; the same items give the same bytes.

dataset/train.parquet, validation.parquet     one row a question, sorted by image and id
dataset/images/                               only when images are kept as files
dataset/README.md                             the card
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL import Image

from qzoom.data.overlay import Style
from qzoom.distill.items import NONE_OPTION, ImageRef, Item, choice_text
from qzoom.distill.pictures import load_source
from qzoom.errors import DataError
from qzoom.images.load import picture_digest
from qzoom.settings import Between, settings
from qzoom.store.log import write_atomic

if TYPE_CHECKING:
    import pyarrow

_ORIENTATION_TAG = 0x0112
_PLAIN = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def encode_picture(
    picture: ImageRef, encoding: str = "png", quality: int = 95, images: tuple[Path, Path] | None = None
) -> dict[str, Any]:
    """The upright RGB image, without a box, as `datasets` stores it: {"bytes": ..., "path": ...}.

    Its own file is used where every reader finds the same pixels in it; else it is encoded anew. With `images` it is
    written to the first folder and named as in the second (ImageError: the picture is missing or cannot be decoded).
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
        return {"bytes": data, "path": name}
    images[0].mkdir(exist_ok=True)
    (images[0] / name).write_bytes(data)
    return {"bytes": None, "path": str(images[1] / name)}


def _own_file(picture: ImageRef) -> tuple[bytes | None, str]:
    """The file's bytes and suffix when every reader finds the same pixels in it."""
    if not picture.root:
        return None, ""
    path = Path(picture.root) / picture.source
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=tuple(_PLAIN)) as image:
            upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1 and getattr(image, "n_frames", 1) == 1
            if upright and image.mode == "RGB" and picture_digest(image) == picture.digest:
                return data, _PLAIN[str(image.format)]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    return None, ""


SPLITS = ("train", "validation")


@settings
class ExportSettings:
    """How rows are written."""

    form: Literal["auto", "open", "choice"] = "auto"
    """"open" questions, "choice" (items without choices are left out), or "auto": choices where there are some."""
    embed: bool = True
    """Images inside the Parquet files; else as files in `images`, named by path."""
    encoding: Literal["png", "jpeg"] = "png"
    """Encoding of images whose own file cannot be used (rotated, palette, drawn, ...)."""
    quality: Annotated[int, Between(1, 100)] = 95
    """Quality of JPEG."""
    validation: Annotated[float, Between(0, 0.9)] = 0.05
    """Share of the images that is kept apart for validation."""
    style: Style = "rectangle"
    """How training marks the box unless its recipe says otherwise."""
    row_group: Annotated[int, Between(1, 10_000)] = 32
    """Rows that are written, and read, together."""


def split_of(picture: ImageRef, settings: ExportSettings) -> str:
    """The split of a picture, from its digest alone: all its questions are on one side, whatever else there is."""
    return SPLITS[int(picture.digest[:8], 16) / 2**32 < settings.validation]


def to_row(item: Item, image: dict[str, Any], settings: ExportSettings) -> dict[str, Any] | None:
    """An item as a row, with an image of `encode_picture`; None for an item that has no row in the chosen form
    (DataError: a part is missing)."""
    if item.target is None or item.draft is None or item.answer is None:
        raise DataError(f"The item {item.id} has no target, question or answer; run the steps before export first.")
    choices = item.choices if settings.form != "open" else None
    # The answer of a negative without its right option refers to options.
    needs_options = item.draft.negative and item.answer.text == NONE_OPTION
    if choices is None and (settings.form == "choice" or needs_options):
        return None
    answer = item.answer.text if choices is None else choices.letter
    question = item.draft.text if choices is None else choice_text(item.draft.text, choices.options)
    passed = item.difficulty
    return {
        "id": item.id,
        "images": [image],
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "question": question,
        "answer": answer,
        "source": _utf8(item.picture.dataset) or "distill",
        "kind": item.draft.kind,
        "extra_info": {
            "question": item.draft.text,
            "kind": item.draft.kind,
            "negative": item.draft.negative,
            "pair": item.draft.pair,
            "text": item.answer.text,
            "split": split_of(item.picture, settings),
            "area": item.target.area_share(item.picture),
            "area_bin": item.target.area_bin,
            "passes": None if passed is None else passed.passes,
            "samples": None if passed is None else passed.samples,
        },
        "bbox": list(item.target.box),
        "bbox_norm": list(item.target.normalised(item.picture)),
        "choices": None if choices is None else list(choices.options),
        "letter": "" if choices is None else choices.letter,
        "style": settings.style,
        "provenance": _utf8(_provenance(item)),
    }


def schema() -> pyarrow.Schema:
    """The columns, with what `datasets` needs to decode the pictures."""
    from datasets import Features, Image, List, Value

    text, whole, real = Value("string"), Value("int32"), Value("float64")
    message = {"role": text, "content": text}
    extra = {"question": text, "kind": text, "negative": Value("bool"), "pair": text, "text": text, "split": text}
    extra |= {"area": real, "area_bin": whole, "passes": whole, "samples": whole}
    columns = {"id": text, "images": List(Image()), "prompt": List(message), "completion": List(message)}
    columns |= {"question": text, "answer": text, "source": text, "kind": text, "extra_info": extra}
    columns |= {"bbox": List(whole), "bbox_norm": List(real), "choices": List(text), "letter": text}
    return Features(columns | {"style": text, "provenance": text}).arrow_schema


def write_dataset(
    items: Iterator[Item],
    folder: Path,
    settings: ExportSettings,
    make_card: Callable[[dict[str, int]], str],
    drop: Callable[[ImageRef], bool] | None = None,
) -> dict[str, int]:
    """Write the Parquet files and the card; returns the rows of each split. The folder appears complete or not at all.

    A link to a folder stays one, and what it leads to is written.

    Args:
        items: kept ones, those of a picture one after the other, in the order of the rows.
        make_card: the card's text from the rows of each split.

    Raises:
        DataError: an item lacks a part, or the folder cannot be written, as a mount point, which cannot be replaced.
        ImageError: a picture is gone.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.ismount(folder):
        raise DataError(f"{folder} is a mount point, which cannot be replaced as a whole; mount the folder above it.")
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
    drop: Callable[[ImageRef], bool] | None,
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
    """The text without the surrogates of a file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _provenance(item: Item) -> str:
    """The provenance of a row, as JSON."""
    target, draft, answer = item.target, item.draft, item.answer
    facts: dict[str, Any] = {
        "picture": {
            "digest": item.picture.digest,
            "source": item.picture.source,
            "dataset": item.picture.dataset,
            "size_px": [item.picture.width, item.picture.height],
        },
        "proposer": target.proposer if target else "",
        "phrase": target.phrase if target else "",
        "crop_box": list(target.crop_box) if target else [],
        "crop_scale": target.scale if target else 1.0,
        "question_writer": draft.writer if draft else "",
        "agreement": {"count": answer.count, "votes": answer.votes, "by": answer.by} if answer else {},
        "votes": [[vote.teacher, vote.sample, vote.status, vote.text] for vote in item.votes],
        "models": [list(pair) for pair in item.models],
        "seed": item.seed,
    }
    return json.dumps(facts, sort_keys=True, ensure_ascii=False)
