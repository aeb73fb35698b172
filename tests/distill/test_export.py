import json

import pytest
from PIL import Image

from qzoom.distill.export import ExportSettings, split_of, write_dataset
from qzoom.distill.items import Choices, ImageRef, choice_text
from qzoom.distill.pictures import ImageSource, list_sources, scan
from qzoom.errors import ConfigError, DataError
from tests.distill.views import finished_item

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "in"
    pictures.mkdir()
    turned = Image.new("RGB", (60, 40), "white")
    turned.paste((200, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(pictures / "turned.jpg", exif=exif)
    turned.convert("P").save(pictures / "palette.png")
    Image.linear_gradient("L").convert("RGB").save(pictures / "plain.png")
    return pictures


def written(folder, out, card="card", **options):
    settings = ExportSettings(**options)
    records = sorted((scan(source)[0] for source in list_sources([str(folder)])), key=lambda one: one.digest)
    items = [finished_item(record, text=f"Which code {n}?") for record in records for n in range(2)]
    return write_dataset(iter(items), out, settings, lambda counts: f"{card} {sorted(counts.items())}")


def test_datasets_reads_it_and_decodes_upright_pictures(folder, tmp_path):
    counts = written(folder, tmp_path / "out", validation=0.0)
    assert counts == {"train": 6, "validation": 0}
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    first = ["id", "images", "prompt", "completion", "question", "answer", "source", "kind", "extra_info"]
    assert data.column_names == [*first, "bbox", "bbox_norm", "choices", "letter", "style", "provenance"]
    by_source = {json.loads(row["provenance"])["picture"]["source"]: row for row in data}
    turned = by_source["turned.jpg"]["images"][0]
    assert turned.size == (40, 60)
    assert turned.getpixel((35, 5))[0] > 150 > turned.getpixel((35, 5))[1]
    assert by_source["palette.png"]["images"][0].mode == "RGB"
    row = by_source["plain.png"]
    assert row["prompt"] == [{"role": "user", "content": row["extra_info"]["question"]}]
    assert row["completion"] == [{"role": "assistant", "content": "K7"}]
    assert (row["question"], row["answer"]) == (row["extra_info"]["question"], "K7")
    assert row["bbox"] == [10, 10, 40, 30]
    assert row["bbox_norm"] == [10 / 256, 10 / 256, 40 / 256, 30 / 256]
    assert row["choices"] is None


def test_trl_takes_rows_as_they_are(folder, tmp_path):
    data_utils = pytest.importorskip("trl.data_utils")
    written(folder, tmp_path / "out", validation=0.0)
    row = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )[0]
    assert data_utils.is_conversational(row)
    (message,) = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][0]["image"] is row["images"][0]


def test_files_are_deterministic_and_originals_are_taken_over(folder, tmp_path):
    import pyarrow.parquet as parquet

    written(folder, tmp_path / "out", validation=0.0)
    rows = parquet.read_table(tmp_path / "out/train.parquet").to_pylist()
    found = {json.loads(row["provenance"])["picture"]["source"]: row["images"][0]["bytes"] for row in rows}
    assert found["plain.png"] == (folder / "plain.png").read_bytes()
    assert found["turned.jpg"].startswith(b"\x89PNG")
    for name in ("one", "two"):
        written(folder, tmp_path / name, validation=0.5)
    for file in ("train.parquet", "validation.parquet", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_link_stays_one_and_a_mount_point_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    link = tmp_path / "dataset"
    link.symlink_to(tmp_path / "big")
    for _ in range(2):
        written(folder, link)
        assert link.is_symlink()
        assert sorted(path.name for path in (tmp_path / "big").iterdir()) == [
            "README.md",
            "train.parquet",
            "validation.parquet",
        ]
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("big"))
    with pytest.raises(DataError, match="big is a mount point, which cannot be replaced"):
        written(folder, link)


def test_pictures_as_files_can_be_read_by_path(folder, tmp_path):
    written(folder, tmp_path / "out", validation=0.0, embed=False)
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert {image[0].size for image in data["images"]} == {(40, 60), (60, 40), (256, 256)}
    assert len(list((tmp_path / "out/images").iterdir())) == 3


def test_choices_become_the_question(tmp_path):
    picture, _ = scan(ImageSource("scenes:3", "", "scenes"))
    item = finished_item(picture, choices=Choices(("K7", "Z2", "P1", "none of these"), "A", "rule"))
    open_item = finished_item(picture, text="Another?")
    counts = write_dataset(
        iter([item, open_item]), tmp_path / "out", ExportSettings(form="choice", validation=0.0), lambda _: ""
    )
    assert counts["train"] == 1
    row = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )[0]
    assert (row["answer"], row["letter"], row["extra_info"]["text"]) == ("A", "A", "K7")
    assert row["prompt"][0]["content"] == choice_text("What is the code?", ["K7", "Z2", "P1", "none of these"])
    assert row["choices"] == ["K7", "Z2", "P1", "none of these"]


def test_split_goes_by_picture_and_unfinished_items_are_refused(tmp_path):
    settings = ExportSettings(validation=0.25)
    splits = [split_of(ImageRef(f"{n:08x}" + "0" * 12, "a", 9, 9), settings) for n in range(0, 2**32, 2**26)]
    assert splits.count("validation") == 16
    picture = ImageRef("0" * 20, "scenes:1", 9, 9)
    item = finished_item(picture)
    bare = type(item)(picture, item.target, item.draft)
    with pytest.raises(DataError, match="no target, question or answer"):
        write_dataset(iter([bare]), tmp_path / "out", ExportSettings(), lambda _: "")
    with pytest.raises(ConfigError, match="style"):
        ExportSettings(style="star")
