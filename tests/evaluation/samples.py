"""A small question file with pictures, and a random model to ask."""

from __future__ import annotations

import json
from pathlib import Path

from qzoom.data.samples import AnswerRow
from qzoom.model import QZoom
from qzoom.types import GateDecision, Region, Usage
from tests.tiny_models import engine, picture


def receipt(name, width=200, height=140, **changes):
    """A record with one question of each field; the company's place is unknown."""
    record = {
        "id": name,
        "image": f"images/{name}.png",
        "width": width,
        "height": height,
        "questions": [
            {"field": "total", "question": "What is the total?", "answer": "33.90", "boxes": [[10, 100, 60, 120]]},
            {"field": "date", "question": "What is the date?", "answer": "12-01-19", "boxes": [[5, 5, 50, 20]]},
            {"field": "company", "question": "Which company?", "answer": "ACME SDN BHD", "boxes": []},
        ],
    }
    return record | changes


def write_split(folder: Path, records, split: str = "dev", *, pictures: bool = True) -> Path:
    """Write `split.jsonl` (texts go in as they are) and a picture for each record; returns the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if pictures:
        for seed, record in enumerate(records):
            if isinstance(record, dict):
                picture(seed, record["width"], record["height"]).save(folder / record["image"])
    return folder


def model(**options) -> QZoom:
    """A random Qwen3-VL with branches, or without with heads=False."""
    return QZoom(engine("qwen3_vl", **options), "random")


def row(prediction="33.90", answer="33.90", *, zoom=(), size_px=(100, 200), error=None, **values) -> AnswerRow:
    """A row with 100 coarse tokens, zoomed into the boxes of `zoom`, 10 tokens each."""
    regions = tuple(Region(box, 0.5, 0, (64, 64), 10) for box in zoom)
    given = {
        "picture": "a", "index": 0, "count": 1, "field": "total", "question": "What is the total?", "boxes": (),
        "easy": None, "seconds": 0.5,
    } | values  # fmt: skip
    if error:
        return AnswerRow(answer=answer, size_px=size_px, error=error, **given)
    return AnswerRow(
        answer=answer, size_px=size_px, prediction=prediction, finish_reason="stop",
        gate=GateDecision(0.75, 0.5, bool(zoom)), regions=regions, usage=Usage(100, 10 * len(regions), 120, 5, 0),
        timing_ms={"look": 12.5}, **given,
    )  # fmt: skip
