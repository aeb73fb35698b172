import base64
import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import ImageOps

from qzoom.data.synthetic.scenes import render_scene
from qzoom.distill.decontaminate import DecontaminateSettings, decontaminate, read_pictures
from qzoom.errors import ConfigError


@pytest.fixture(scope="module")
def pictures():
    return [render_scene(seed, width_px=512, height_px=384).image for seed in range(6)]


@pytest.fixture
def benchmark(tmp_path, pictures):
    folder = tmp_path / "bench"
    folder.mkdir()
    for number in range(3):
        pictures[number].save(folder / f"{number}.png")
    return folder


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_copies_are_found_and_named(tmp_path, pictures, benchmark):
    mine = tmp_path / "mine"
    mine.mkdir()
    pictures[0].resize((300, 225)).save(mine / "smaller.jpg", quality=60)
    ImageOps.mirror(pictures[1]).save(mine / "mirrored.png")
    pictures[4].save(mine / "other.png")
    pictures[5].save(mine / "another.png")
    report = decontaminate(mine, DecontaminateSettings((str(benchmark),)))
    assert (report.pictures, report.benchmark_pictures, report.unreadable) == (4, 3, 0)
    assert {(m.picture, m.benchmark, m.mirrored) for m in report.matches} == {
        ("smaller.jpg", "0.png", False),
        ("mirrored.png", "1.png", True),
    }
    plain = decontaminate(mine, DecontaminateSettings((str(benchmark),), flips=False))
    assert [match.picture for match in plain.matches] == ["smaller.jpg"]


def test_parquet_in_several_shapes_is_read(tmp_path, pictures, benchmark):
    rows = [
        {"images": [{"bytes": png(pictures[2]), "path": "a.png"}], "image": png(pictures[3])},
        {"images": [{"bytes": None, "path": str(benchmark / "1.png")}], "image": b"broken"},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    report = decontaminate(tmp_path / "mine.parquet", DecontaminateSettings((str(benchmark),)))
    assert (report.pictures, report.unreadable) == (4, 1)
    assert {match.benchmark for match in report.matches} == {"1.png", "2.png"}


@pytest.mark.parametrize("named", [True, False])
def test_names_may_repeat_and_equal_pictures_count_once(tmp_path, pictures, benchmark, named):
    for folder, first in (("x", 3), ("y", 0)):
        rows = [png(pictures[number]) for number in range(first, first + 3)]
        cells = [
            {"image": {"bytes": data, "path": f"{n}.png"}} if named else {"image": data} for n, data in enumerate(rows)
        ]
        (tmp_path / "mine" / folder).mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(cells * 2), tmp_path / "mine" / folder / "data.parquet")
    report = decontaminate(tmp_path / "mine", DecontaminateSettings((str(benchmark),)))
    assert (report.pictures, report.unreadable) == (6, 0)
    name = "y/data.parquet: {}.png" if named else "y/data.parquet, row {}, picture 0"
    assert [(m.picture, m.benchmark) for m in report.matches] == [(name.format(n), f"{n}.png") for n in range(3)]


def test_what_the_evaluation_reads_is_read(tmp_path, pictures, benchmark):
    buffer = io.BytesIO()
    pictures[3].save(buffer, "JPEG", quality=95)
    folder = tmp_path / "vstar"
    (folder / "images").mkdir(parents=True)
    pictures[4].save(folder / "images/4.png")
    rows = [
        {"image": base64.b64encode(buffer.getvalue()).decode(), "text": "What is it?"},
        {"image": "images/4.png", "text": "Qk0 is no picture"},
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_dict({"image": [pictures[5]]}).save_to_disk(folder / "saved")
    names = {name for name, image in read_pictures(folder) if image is not None}
    assert names == {
        "images/4.png",
        "test.jsonl, row 0, picture 0",
        "test.jsonl: images/4.png",
        "saved/data-00000-of-00001.arrow, row 0, picture 0",
    }
    assert decontaminate(folder, DecontaminateSettings((str(folder),))).pictures == 3
    for number in (3, 4, 5):
        (tmp_path / str(number)).mkdir()
        pictures[number].resize((300, 225)).save(tmp_path / str(number) / "x.jpg")
        assert decontaminate(tmp_path / str(number), DecontaminateSettings((str(folder),))).matches


def test_nothing_to_compare_is_said(tmp_path, benchmark):
    with pytest.raises(ConfigError, match="--against"):
        decontaminate(benchmark, DecontaminateSettings())
    with pytest.raises(ConfigError, match="does not exist"):
        decontaminate(benchmark, DecontaminateSettings((str(tmp_path / "none"),)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no image"):
        decontaminate(benchmark, DecontaminateSettings((str(tmp_path / "empty"),)))
    np.save(tmp_path / "x.npy", np.zeros(2))
    with pytest.raises(ConfigError, match="neither a folder nor an image, Parquet, JSON Lines or Arrow file"):
        decontaminate(benchmark, DecontaminateSettings((str(tmp_path / "x.npy"),)))
