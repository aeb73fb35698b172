import json
from pathlib import Path

import pytest
from PIL import Image

from qzoom.data.questions import read_receipts
from qzoom.errors import DataError
from tests.evaluation.samples import receipt, write_split

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "receipts"


def changed(**values):
    """A record whose first question is changed; None removes a key."""
    record = receipt("b")
    first = record["questions"][0] | values
    record["questions"][0] = {key: value for key, value in first.items() if value is not None}
    return record


def test_reads(tmp_path):
    task = read_receipts(write_split(tmp_path, [receipt("a"), "", receipt("b", 90, 260)]), "dev")
    assert task.ids == ("a", "b")
    assert (task.name, task.fields) == ("receipts", ("total", "date", "company"))
    sample = task.sample(1)
    assert sample.image == tmp_path / "images" / "b.png"
    assert sample.size_px == (90, 260)
    assert [q.field for q in sample.questions] == ["total", "date", "company"]
    assert sample.questions[0].boxes == ((10, 100, 60, 120),)
    assert sample.questions[0].answer == "33.90"
    assert sample.questions[2].boxes == ()


def test_identity_follows_the_content(tmp_path):
    first = read_receipts(write_split(tmp_path / "one", [receipt("a")]), "dev").identity
    same = read_receipts(write_split(tmp_path / "two", [receipt("a")]), "dev").identity
    other = read_receipts(write_split(tmp_path / "three", [receipt("b")]), "dev").identity
    assert first == same
    assert first["sha256"] != other["sha256"]


BAD = {
    "not json": ('{"id": "b", ', "not JSON"),
    "an array": ("[1, 2]", "expected an object"),
    "nested": ("[" * 100_000, "line 2"),
    "unknown key": (receipt("b", picture="x.png"), "unknown field 'picture'"),
    "typing mistake": (receipt("b", imag="x.png"), "did you mean 'image'"),
    "missing key": ({k: v for k, v in receipt("b").items() if k != "width"}, "'width' is missing"),
    "number as id": (receipt("b", id=7), "'id' must be a text"),
    "width as text": (receipt("b") | {"width": "200"}, "'width' must be a whole number"),
    "width as bool": (receipt("b") | {"width": True}, "'width' must be a whole number"),
    "no area": (receipt("b") | {"width": 0}, "must be positive"),
    "no questions": (receipt("b", questions=[]), "no questions"),
    "questions as text": (receipt("b", questions="What?"), "'questions' must be a list"),
    "question as text": (receipt("b", questions=["What?"]), "question 1: expected an object"),
    "unknown question key": (changed(hint="low on the page"), "question 1: unknown field 'hint'"),
    "unknown question field": (changed(field="address"), "unknown field 'address'; known: total, date, company"),
    "answer as number": (changed(answer=33.9), "'answer' must be a text, not 33.9"),
    "empty answer": (changed(answer="  "), "'answer' is empty"),
    "no answer": (changed(answer=None), "'answer' is missing"),
    "box of three": (changed(boxes=[[1, 2, 3]]), "not [x0, y0, x1, y1]"),
    "box of fractions": (changed(boxes=[[1, 2, 3.5, 4]]), "not [x0, y0, x1, y1]"),
    "box inside out": (changed(boxes=[[9, 2, 3, 4]]), "not [x0, y0, x1, y1]"),
    "box outside": (changed(boxes=[[1, 2, 201, 4]]), "inside the picture of 200 x 140 px"),
    "missing picture": (receipt("b", image="images/gone.png"), "'images/gone.png' is not in"),
    "folder as picture": (receipt("b", image="images"), "'images' is not in"),
    "picture elsewhere": (receipt("b", image="../secret.png"), "inside the data folder"),
    "absolute picture": (receipt("b", image="/etc/passwd"), "inside the data folder"),
    "wrong size": (receipt("b", image="images/a.png", width=201), "is 200 x 140 px, not the stated 201 x 140"),
    "second id": (receipt("a"), "the id 'a' is already on line 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines(tmp_path, kind):
    record, said = BAD[kind]
    write_split(tmp_path, [receipt("a")])
    if kind in ("unknown question key", "unknown question field") or said.startswith(("'answer'", "not [")):
        Image.new("RGB", (200, 140)).save(tmp_path / "images" / "b.png")
    line = record if isinstance(record, str) else json.dumps(record)
    with (tmp_path / "dev.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as caught:
        read_receipts(tmp_path, "dev")
    assert f"{tmp_path / 'dev.jsonl'}, line 2" in str(caught.value)
    assert said in str(caught.value)


def test_not_utf8(tmp_path):
    write_split(tmp_path, [receipt("a")])
    (tmp_path / "dev.jsonl").write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"line 1: not UTF-8 text \(byte 12\)"):
        read_receipts(tmp_path, "dev")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, text):
    (tmp_path / "dev.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="no questions in it"):
        read_receipts(tmp_path, "dev")


def test_missing_file_names_the_splits_there(tmp_path):
    write_split(tmp_path, [receipt("a")], "test")
    with pytest.raises(DataError, match="splits there: test"):
        read_receipts(tmp_path, "dev")
    with pytest.raises(DataError, match="--data"):
        read_receipts(tmp_path / "nowhere", "dev")


def test_sizes_are_those_after_rotation(tmp_path):
    write_split(tmp_path, [receipt("a", 140, 200, image="images/a.jpg")], pictures=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 140)).save(tmp_path / "images" / "a.jpg", exif=exif)
    assert read_receipts(tmp_path, "dev").sample(0).size_px == (140, 200)


def test_a_damaged_picture_is_left_to_the_run(tmp_path):
    write_split(tmp_path, [receipt("a")], pictures=False)
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    assert read_receipts(tmp_path, "dev").ids == ("a",)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the scanned receipts are not beside the repository")
def test_the_real_files():
    dev, train = (read_receipts(SHARED, split) for split in ("dev", "train"))
    assert (len(dev.ids), len(train.ids)) == (55, 246)
    assert not set(dev.ids) & set(train.ids)
    assert dev.sample(0).questions[0].answer == "33.90"
