import json
from pathlib import Path

import pytest
from PIL import Image

from qzoom.data.questions import load_picture, open_questions, read_questions, read_receipts, with_its_row
from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.store.schema import Turn
from tests.evaluation.samples import receipt, write_split

GOOD = {"id": "a", "image": "one.png", "question": "What?"}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "one.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "q.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_reads_questions_in_both_forms(folder):
    turns = [{"question": "Who?", "answer": "me"}, {"question": "Where?", "boxes": [[0, 0, 5, 5]]}]
    path = write(
        folder,
        GOOD | {"answer": ["x", "y"], "mode": "natural", "source": "set"},
        "",
        {"id": "b", "image": "one.png", "turns": turns},
    )
    (first, second), _ = read_questions(path)
    assert (first.name, first.mode, first.source) == ("a", "natural", "set")
    assert first.turns == (Turn("What?", ("x", "y")),)
    assert second.turns == (Turn("Who?", ("me",)), Turn("Where?", (), ((0, 0, 5, 5),)))
    assert second.source == "q"
    assert load_picture(first).size_px == (40, 30)


def test_reads_pictures_with_all_their_questions(folder):
    questions = [
        {"field": "total", "question": "How much?", "answer": "3", "boxes": [[0, 0, 5, 5]]},
        {"field": "star", "question": "Is there a star?", "answer": "no", "boxes": [], "negative": True},
    ]
    picture = {"id": "p", "image": "one.png", "width": 40, "height": 30, "questions": questions}
    (first, second), _ = read_questions(write(folder, GOOD, picture))
    assert (second.name, second.image, second.mode, second.source, second.root) == (
        "p", "one.png", "text", "q", first.root,
    )  # fmt: skip
    assert second.turns == (Turn("How much?", ("3",), ((0, 0, 5, 5),)), Turn("Is there a star?", ("no",)))
    with pytest.raises(DataError, match=r"q.jsonl, line 1: 'width' is missing"):
        read_questions(write(folder, {key: value for key, value in picture.items() if key != "width"}))


MISTAKES = [
    ("{", "not JSON"),
    ("[1]", "expected an object"),
    (GOOD | {"imge": 1}, "unknown field 'imge'; did you mean 'image'"),
    ({"id": "a", "image": "one.png"}, "either 'question' or 'turns'"),
    (GOOD | {"turns": [{"question": "?"}]}, "either 'question' or 'turns'"),
    ({"image": "one.png", "question": "?"}, "'id' is missing"),
    (GOOD | {"id": 3}, "'id' must be a text"),
    (GOOD | {"question": " "}, "'question' is empty"),
    (GOOD | {"image": "two.png"}, "the picture 'two.png' is not in"),
    (GOOD | {"answer": 3}, "'answer' must be a text or a list of texts"),
    (GOOD | {"answer": ["x", 3]}, "'answer' must be a text or a list of texts"),
    (GOOD | {"boxes": [[1, 2, 1, 3]]}, "is not \\[x0, y0, x1, y1\\]"),
    (GOOD | {"boxes": [[1, 2, 3.5, 3]]}, "is not \\[x0, y0, x1, y1\\]"),
    (GOOD | {"mode": "picture"}, "'mode' must be text or natural"),
    ({"id": "a", "image": "one.png", "turns": []}, "must be a list of questions"),
    ({"id": "a", "image": "one.png", "turns": [{"question": "?"}], "answer": "x"}, "belongs into each of the turns"),
    ({"id": "a", "image": "one.png", "turns": [{"ask": "?"}]}, "turn 1: unknown field 'ask'"),
    (GOOD | {"image": "a\0b"}, "is no path"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_mistakes_are_named_with_their_line(folder, line, message):
    with pytest.raises(DataError, match=f"q.jsonl, line 2.*{message}"):
        read_questions(write(folder, GOOD | {"id": "first"}, line))


def test_lines_and_files_that_are_none_are_named(folder):
    with pytest.raises(DataError, match="line 3: the id 'a' is already on line 1"):
        read_questions(write(folder, GOOD, GOOD | {"id": "b"}, GOOD))
    path = folder / "q.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8 text \(byte 9\)"):
        read_questions(path)
    with pytest.raises(DataError, match="no questions that can be used"):
        read_questions(write(folder, "", " "))
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(folder / "missing.jsonl")
    path = write(folder, GOOD)
    with pytest.raises(DataError, match="comes from two of the given sets"):
        open_questions([str(path), str(path)])


def test_bad_lines_can_be_skipped_and_are_counted(folder):
    path = write(folder, GOOD, *(line for line, _ in MISTAKES), GOOD, GOOD | {"id": "z"})
    questions, skipped = read_questions(path, skip_bad=True)
    assert [q.name for q in questions] == ["a", "z"]
    assert [number for number, _ in skipped] == list(range(2, len(MISTAKES) + 3))
    assert "already on line 1" in skipped[-1][1]


def test_drawn_pictures_come_in_the_same_form():
    found, _ = open_questions(["documents:5:2", "scenes:7:1"], per_picture=3)
    assert [q.name for q in found] == ["documents:5", "documents:6", "scenes:7"]
    assert [q.mode for q in found] == ["text", "text", "natural"]
    assert all(len(q.turns) == 3 and q.turns[0].answers for q in found)
    assert min(load_picture(found[0]).size_px) > 100
    assert open_questions(["documents:5:2"], per_picture=3)[0] == found[:2]


def test_a_row_is_what_is_printed_at_the_same_height():
    label, value, below = (20, 100, 90, 118), (150, 104, 220, 120), (20, 118, 300, 136)
    assert with_its_row(value, [label, value, below]) == (20, 104, 220, 120)
    assert with_its_row(below, [label, value]) == below


def test_boxes_of_drawn_documents_can_cover_their_rows():
    plain, _ = open_questions(["documents:0:6", "scenes:7:1"], per_picture=3)
    wide, _ = open_questions(["documents:0:6", "scenes:7:1"], per_picture=3, rows=True)
    assert [[t.question for t in q.turns] for q in plain] == [[t.question for t in q.turns] for q in wide]
    pairs = [
        (one, two)
        for a, b in zip(plain[:6], wide[:6], strict=True)
        for s, t in zip(a.turns, b.turns, strict=True)
        for one, two in zip(s.boxes, t.boxes, strict=True)
    ]
    assert all(two[0] <= one[0] and one[2] <= two[2] and one[1::2] == two[1::2] for one, two in pairs)
    assert any(two[2] - two[0] > 2 * (one[2] - one[0]) for one, two in pairs)
    assert plain[6] == wide[6]


def test_boxes_of_receipts_can_cover_their_rows(folder):
    asked = {"field": "total", "question": "Total?", "answer": "9.50", "boxes": [[30, 10, 38, 18]]}
    record = {"id": "r1", "image": "one.png", "width": 40, "height": 30}
    write(folder, record | {"questions": [asked]}).rename(folder / "train.jsonl")
    name = f"receipts:{folder}:train"
    with pytest.raises(DataError, match=r"train_lines\.jsonl cannot be read"):
        open_questions([name], rows=True)
    lines = [{"text": "Total", "box": [2, 9, 20, 18]}, {"text": "x", "box": [0, 20, 40, 28]}]
    write(folder, record | {"id": "r2", "lines": lines}).rename(folder / "train_lines.jsonl")
    with pytest.raises(DataError, match="no lines of the receipt 'r1'; leave out --rows"):
        open_questions([name], rows=True)
    write(folder, record | {"lines": lines}).rename(folder / "train_lines.jsonl")
    assert open_questions([name], rows=True)[0][0].turns[0].boxes == ((2, 10, 38, 18),)
    assert open_questions([name])[0][0].turns[0].boxes == ((30, 10, 38, 18),)


def test_rows_need_known_lines(folder):
    with pytest.raises(ConfigError, match="its printed lines are not known"):
        open_questions([str(write(folder, GOOD))], rows=True)


@pytest.mark.parametrize("name", ["documents:5", "documents:a:2", "scenes:1:0", "documents:2147483640:10"])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(ConfigError):
        open_questions([name])


def test_pictures_and_files_may_be_links_out_of_the_folder(tmp_path):
    """As in a snapshot of the hub, whose files lie elsewhere under their digests."""
    data = write_split(tmp_path / "data", [receipt("a")])
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("dev.jsonl", "images/a.png")):
        (data / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        (question,), _ = read_questions(folder / "dev.jsonl")
        assert (question.image, question.root) == ("images/a.png", str(snapshot))
        assert load_picture(question).size_px == (200, 140)
        assert open_questions([f"receipts:{folder}:dev"])[0][0].image == "images/a.png"


def test_a_picture_that_has_gone_is_named(folder):
    (question,), _ = read_questions(write(folder, GOOD))
    (folder / "moved").mkdir()
    (folder / "one.png").rename(folder / "moved" / "one.png")
    with pytest.raises(ImageError, match=r"one.png of question 'a' is missing"):
        load_picture(question)
    assert load_picture(question, folder / "moved").size_px == (40, 30)


SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "receipts"


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
    assert (sample.image, sample.size_px) == (tmp_path / "images" / "b.png", (90, 260))
    assert [q.field for q in sample.questions] == ["total", "date", "company"]
    assert (sample.questions[0].boxes, sample.questions[0].answer) == (((10, 100, 60, 120),), "33.90")
    assert sample.questions[2].boxes == ()


def test_identity_follows_the_content(tmp_path):
    first = read_receipts(write_split(tmp_path / "one", [receipt("a")]), "dev").identity
    same = read_receipts(write_split(tmp_path / "two", [receipt("a")]), "dev").identity
    other = read_receipts(write_split(tmp_path / "three", [receipt("b")]), "dev").identity
    assert first == same
    assert first["sha256"] != other["sha256"]


BAD = {
    "nested": ("[" * 100_000, "line 2"),
    "unknown key": (receipt("b", picture="x.png"), "unknown field 'picture'"),
    "missing key": ({k: v for k, v in receipt("b").items() if k != "width"}, "'width' is missing"),
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


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "dev.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="no questions in it"):
        read_receipts(tmp_path, "dev")
    (tmp_path / "dev.jsonl").unlink()
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
