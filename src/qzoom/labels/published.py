"""The authors' published stage-1 label files (pickles) as records; no code in the pickle is executed.

A file is a list of entries with `image`, `prompt` and `text`, and two attention maps (rows, columns): `sink_attn` and
`grounding_attn_o2i`. The maps were computed on an image padded to a square (docs/method.md 5).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qzoom.errors import DataError, ImageError, LaterError
from qzoom.labels import unpickling
from qzoom.labels.label_regions import RegionReport, region_report
from qzoom.labels.maps import label_record, region_labels
from qzoom.labels.settings import LabelMapSettings
from qzoom.labels.workers import read_picture
from qzoom.settings import to_dict
from qzoom.store.records import RecordWriter, note_pending, start_store
from qzoom.store.schema import Attention, Provenance, Question, Response, Skip, Turn, content_id, tensor_digest

MEMORY_BYTES = 16 * 2**30
SECONDS = 3600


def read_pickle(path: Path, *, memory_bytes: int = MEMORY_BYTES, seconds: int = SECONDS) -> tuple[Any, dict[str, Any]]:
    """What a pickle holds: JSON types with {"__array__": name} for arrays, and the arrays by name.

    It is read by a process of its own, with at most so much address space and so many processor seconds; on systems
    that do not limit address space, it is ended when it takes more memory (DataError: it cannot be read, is damaged, or
    holds anything but arrays and builtin containers; or the system cannot limit a process, as Windows).
    """
    from safetensors.numpy import load_file

    if find_spec("resource") is None:
        raise DataError(f"{path}: this system cannot limit the process that would read a pickle; convert it on Linux.")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a pickle of published labels.")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "content"
        words = [str(path.resolve()), str(target), str(memory_bytes), str(seconds)]
        child = subprocess.Popen(
            [sys.executable, "-I", unpickling.__file__, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        said = _watched(child, path, memory_bytes, time.monotonic() + 2 * seconds + 60)
        if child.returncode != 0:
            lines = said.decode("utf-8", "replace").strip().splitlines()
            explained = child.returncode == unpickling.REFUSED and lines
            reason = lines[-1] if explained else "reading it ended the process that tried"
            raise DataError(f"{path} is not a file of labels: {reason}; nothing of it was used.")
        content = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        return content, load_file(target.with_suffix(".safetensors"))


_LIMITS_ADDRESS_SPACE = sys.platform != "darwin"
_LOOK_EVERY_S = 0.1


def _watched(child: subprocess.Popen[bytes], path: Path, memory_bytes: int, deadline: float) -> bytes:
    """What a process wrote to standard error until its end; one that takes too long or too much is ended."""
    while True:
        try:
            return child.communicate(timeout=_LOOK_EVERY_S)[1]
        except subprocess.TimeoutExpired:
            late = time.monotonic() > deadline
            if late or (not _LIMITS_ADDRESS_SPACE and _resident_bytes(child.pid) > memory_bytes):
                child.kill()
                child.communicate()
                reason = "could not be read in time" if late else "needs more memory than is allowed"
                raise DataError(f"{path} {reason}, so it was left alone.") from None


def _resident_bytes(pid: int) -> int:
    """Memory of a process; 0 when it has ended."""
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return 1024 * int(found.stdout.strip() or 0)


def convert_published(
    path: Path,
    folder: Path,
    images: Path,
    *,
    model: str = "unknown",
    settings: LabelMapSettings | None = None,
    fresh: bool = False,
) -> RegionReport:
    """Write a store of region labels from a published file; a rerun continues it.

    An entry whose picture is missing or cannot be read now is left for a rerun, as in `label_regions`.

    Args:
        path: the pickle.
        images: folder that the entries' picture paths start from.
        model: which model the labels were made with, for the record.

    Raises:
        DataError: the pickle cannot be used.
        ConfigError: the store was made in another way.
    """
    content, arrays = read_pickle(path)
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} is not a file of labels: it holds no list of entries.")
    settings = settings or LabelMapSettings()
    header = {"maps": to_dict(settings), "images": str(images.resolve()), "entries": len(content), "file": path.name}
    provenance = Provenance(model=model, prompt="published", sizes={"view": "square"})
    start_store(folder, "regions", header, provenance, fresh=fresh)
    samples = [f"entry-{number}" for number in range(len(content))]
    note_pending(folder, samples)
    unread: list[str] = []
    with RecordWriter(folder) as writer:
        for number, (sample, entry) in enumerate(zip(samples, content, strict=True)):
            if sample in writer.done:
                continue
            try:
                records = _records(entry, arrays, images, settings, number)
            except LaterError as error:
                unread.append(f"entry {number}: {error}")
                continue
            except (DataError, ImageError) as error:
                records = [(Skip(sample, f"entry {number}: {error}"), {})]
            writer.append(sample, records)
    return dataclasses.replace(region_report(folder), unread=len(unread), unread_reason="".join(unread[:1]))


def _records(
    entry: Any, arrays: dict[str, np.ndarray], images: Path, settings: LabelMapSettings, number: int
) -> list[Any]:
    if not isinstance(entry, dict):
        raise DataError(f"it is a {type(entry).__name__}, not a mapping.")
    texts = {}
    for key in ("image", "prompt", "text"):
        if not isinstance(entry.get(key), str):
            raise DataError(f"{key!r} is missing or no text.")
        texts[key] = entry[key]
    maps = {}
    for key in ("sink_attn", "grounding_attn_o2i"):
        name = entry[key].get("__array__") if isinstance(entry.get(key), dict) else None
        if name not in arrays or arrays[name].ndim != 2:
            raise DataError(f"{key!r} is missing or not a map of rows and columns.")
        maps[key] = arrays[name].astype(np.float32)
    mode: Literal["text", "natural"] = "natural" if entry.get("mode") == "natural" else "text"
    source = str(entry.get("dataset") or "published")
    name = str(entry.get("question_id") or entry.get("uid") or number)
    question = Question(name, texts["image"], (Turn(texts["prompt"]),), mode, source, str(images.resolve()))
    size = read_picture(question, "").size_px
    side = max(size)
    rows, columns = maps["sink_attn"].shape
    question_id = content_id(question)
    response = Response(question_id, 0, texts["prompt"], texts["text"], (), (side, side), (rows, columns), "square")
    attention = Attention(content_id(response), (), "heads")
    tensors = {"grounding": maps["grounding_attn_o2i"], "sink": maps["sink_attn"]}
    attention_id = content_id(attention, {name: tensor_digest(array) for name, array in tensors.items()})
    label, labels = label_record(
        region_labels(maps["sink_attn"], maps["grounding_attn_o2i"], settings, padded_from_px=size),
        question=question_id,
        turn=0,
        response=content_id(response),
        attention=attention_id,
        text=texts["text"],
        prompt=texts["prompt"],
        view="square",
        map_view="square",
        size_px=size,
        boxes=(),
    )
    return [(question, {}), (response, {}), (attention, tensors), (label, {"labels": labels})]
