"""A small exported data set about coloured squares, and a small random student in a folder."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.training.student.recipe import SftSettings, StudentRecipe
from tests.tiny_models import build_engine

COLOURS = ("red", "green", "blue", "black")


def picture(number: int) -> bytes:
    image = Image.new("RGB", (128, 96), (255, 255 - 10 * number, 255))
    image.paste(COLOURS[number % 4], (16, 16, 48, 48))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def row(number: int, kind: str = "colour", **changes) -> dict:
    text = {"colour": "What colour?", "counting": "How many?", "absent": "What colour is the star?"}[kind]
    answer = {"colour": COLOURS[number % 4], "counting": "1", "absent": "none"}[kind]
    return {
        "id": f"{number:04d}{kind}",
        "images": [{"bytes": picture(number), "path": f"{number}.png"}],
        "prompt": [{"role": "user", "content": text}],
        "answer": answer,
        "bbox": [16, 16, 48, 48],
        "choices": None,
        "letter": "",
        "extra_info": {"kind": kind if kind != "absent" else "colour", "negative": kind == "absent", "pair": ""},
    } | changes


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("answer", pa.string()),
        ("bbox", pa.list_(pa.int32())),
        ("choices", pa.list_(pa.string())),
        ("letter", pa.string()),
        ("extra_info", pa.struct([("kind", pa.string()), ("negative", pa.bool_()), ("pair", pa.string())])),
    ]
)


def write(folder: Path, rows: list[dict], name: str = "train", schema: pa.Schema | None = SCHEMA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Eight pictures with three questions each to train on, two to validate with."""
    folder = tmp_path_factory.mktemp("exported")
    write(folder, [row(n, kind) for n in range(8) for kind in ("colour", "counting", "absent")])
    return write(folder, [row(n, kind) for n in (20, 21) for kind in ("colour", "absent")], "validation")


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """A random Qwen3-VL with branches."""
    folder = tmp_path_factory.mktemp("student") / "model"
    save_pretrained(build_engine("qwen3_vl"), folder, include_base=True)
    return folder


def recipe_of(student: Path, data: Path, **changes) -> StudentRecipe:
    values = {
        "base": str(student),
        "data": str(data),
        "method": "sft",
        "tokens": (12,),
        "precision": "float32",
        "gradient_checkpointing": False,
        "validation_steps": 100,
        "max_new_tokens": 4,
        "save_steps": 100,
        "trackers": (),
        "sft": SftSettings(learning_rate=3e-3, schedule="constant", warmup=0.0, batch=4, micro_batch=2, steps=2),
    }
    return StudentRecipe(**(values | changes))
