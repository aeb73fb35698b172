import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from qzoom.distill.export import ExportSettings, write_dataset
from qzoom.distill.items import Choices
from qzoom.distill.pictures import list_sources, scan
from qzoom.errors import DataError
from qzoom.images.load import load_image
from qzoom.training.student.data import digest_of, read_split
from qzoom.training.student.schedule import epoch_entries, make_schedule
from tests.distill.views import finished_item
from tests.training.student.conftest import SCHEMA, picture, row, write


def test_rows_become_questions(data, tmp_path):
    split = read_split(data, tmp_path, 0.5, 0)
    assert (len(split.train), len(split.validation)) == (24, 4)
    first = split.train[0]
    assert (first.id, first.text, first.answer, first.box) == ("0000colour", "What colour?", "red", (16, 16, 48, 48))
    assert (first.kind, first.negative) == ("colour", False)
    assert split.train[2].negative
    assert Path(first.picture).read_bytes() == picture(0)
    assert len(list(tmp_path.iterdir())) == 10
    assert digest_of(split.train) == digest_of(read_split(data, tmp_path / "b", 0.5, 0).train)
    assert digest_of(split.train) != digest_of(split.train[::-1])


def test_whole_pictures_are_held_out(tmp_path):
    folder = write(tmp_path / "data", [row(n, kind) for n in range(40) for kind in ("colour", "counting")])
    split = read_split(folder, tmp_path / "p", 0.25, 0)
    assert not {q.picture for q in split.train} & {q.picture for q in split.validation}
    assert 4 <= len(split.validation) <= 36
    assert len(split.train) + len(split.validation) == 80
    again = read_split(folder, tmp_path / "p", 0.25, 0)
    assert again == split
    assert read_split(folder, tmp_path / "p", 0.25, 1).validation != split.validation
    assert read_split(folder, tmp_path / "p", 0.0, 0).validation == ()
    folder = write(tmp_path / "data", [row(0), row(1), row(0, "counting")])
    write(folder, [row(0, "absent")], "validation")
    assert {q.id for q in read_split(folder, tmp_path / "p", 0.0, 0).train} == {"0001colour"}


@pytest.mark.parametrize("embed", [True, False])
def test_reads_what_distillation_exports(tmp_path, embed):
    """The pipeline's own export, a turned photo and a multiple-choice question among it."""
    (tmp_path / "in").mkdir()
    turned = Image.new("RGB", (60, 40), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "in" / "turned.jpg", exif=exif)
    (source,) = list_sources([str(tmp_path / "in")])
    record, _ = scan(source)
    free = finished_item(record, text="Which code?")
    chosen = dataclasses.replace(free, choices=Choices(("K7", "K1", "none of these"), "A", "rule"))
    settings = ExportSettings(validation=0.0, embed=embed)
    write_dataset(iter([free, chosen]), tmp_path / "out", settings, lambda counts: "card")
    one, two = read_split(tmp_path / "out", tmp_path / "p", 0.0, 0).train
    assert (one.text, one.answer, one.choices) == ("Which code?", "K7", ())
    assert one.box == free.target.box
    assert (two.answer, two.letter, two.choices) == ("A", "A", ("K7", "K1", "none of these"))
    assert two.text.startswith("Which code?\nA. K7\nB. K1\nC. none of these\n")
    assert one.picture == two.picture
    assert load_image(one.picture).size_px == (40, 60)


def test_choices_older_prompts_and_pictures_by_path(tmp_path):
    text = "<image>Which?\nA. red\nB. green"
    folder = write(tmp_path / "data", [row(1, prompt=_turn(text), choices=["red", "green"], letter="B", answer="B")])
    (question,) = read_split(folder, tmp_path / "p", 0.0, 0).train
    assert (question.text, question.choices) == ("Which?\nA. red\nB. green", ("red", "green"))
    assert (question.answer, question.letter) == ("B", "B")
    (tmp_path / "data" / "a.png").write_bytes(picture(3))
    folder = write(tmp_path / "data", [row(3, images=[{"bytes": None, "path": "a.png"}])])
    assert Path(read_split(folder, tmp_path / "p", 0.0, 0).train[0].picture) == tmp_path / "data" / "a.png"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": " "}, "row 2: the answer is empty"),
        ({"images": []}, "row 2: expected one picture, found 0"),
        ({"images": [{"bytes": None, "path": "none.png"}]}, "row 2: the picture none.png is missing"),
        ({"images": [{"bytes": None, "path": None}]}, "neither bytes nor a path"),
        ({"bbox": [1, 2, 3]}, "bbox holds 3 numbers"),
        ({"bbox": [5, 5, 5, 9]}, "is empty"),
        ({"prompt": []}, "no user turn"),
        ({"prompt": [{"role": "user", "content": "<image>"}]}, "the question is empty"),
        ({"choices": ["a", "b"], "letter": "C"}, "'C' is the letter of none of its 2 choices"),
    ],
)
def test_bad_rows_are_refused(tmp_path, changes, message):
    folder = write(tmp_path / "data", [row(0), row(1, **changes)])
    with pytest.raises(DataError, match=message):
        read_split(folder, tmp_path / "p", 0.0, 0)


def test_bad_files_are_refused(tmp_path):
    write(tmp_path / "a", [{"id": "x"}], schema=pa.schema([SCHEMA.field("id")]))
    with pytest.raises(DataError, match="no column images, prompt, answer"):
        read_split(tmp_path / "a", tmp_path / "p", 0.0, 0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_split(tmp_path / "b", tmp_path / "p", 0.0, 0)
    write(tmp_path / "c", [])
    with pytest.raises(DataError, match="no question to train on"):
        read_split(tmp_path / "c", tmp_path / "p", 0.0, 0)


@pytest.fixture
def questions(data, tmp_path):
    return read_split(data, tmp_path, 0.0, 0).train


def order(questions, **changes):
    values = {"steps": 10, "batch": 4, "most": 2, "tokens": (8, 12), "negatives": None, "rehearsal": 0.0, "seed": 0}
    return make_schedule(questions, **(values | changes))


def test_every_question_once_a_pass_in_a_fixed_order(questions):
    rows = epoch_entries(questions, 2, None, 0, 0)
    assert sorted(i for r in rows for i in r) == list(range(24))
    assert max(map(len, rows)) == 2
    assert all(len({questions[i].picture for i in r}) == 1 for r in rows)
    assert rows != epoch_entries(questions, 2, None, 1, 0)
    assert rows == epoch_entries(questions, 2, None, 0, 0)
    rows = order(questions)
    assert rows == order(questions)
    assert rows != order(questions, seed=1)
    assert len(rows) == 40
    assert [r.epoch for r in rows] == sorted(r.epoch for r in rows)
    assert rows[20].progress == 0.5
    assert {len({r.tokens for r in rows[i : i + 4]}) for i in range(0, 40, 4)} == {1}
    assert {r.tokens for r in rows} == {8, 12}
    assert {r.tokens for r in order(questions, tokens=())} == {0}


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_replay_is_spread_evenly(questions, share):
    rows = order(questions, steps=20, rehearsal=share)
    drawn = [r.rehearsal >= 0 for r in rows]
    assert sum(drawn) == round(80 * share)
    assert all(abs(sum(drawn[: i + 1]) - (i + 1) * share) <= 1 for i in range(80))
    assert len({r.rehearsal for r in rows if r.rehearsal >= 0}) == sum(drawn)
    assert all(not r.questions for r in rows if r.rehearsal >= 0)


@pytest.mark.parametrize(("share", "count"), [(0.5, 16), (0.2, 4), (0.75, 48), (0.0, 0)])
def test_share_of_negatives(questions, share, count):
    seen = [i for r in epoch_entries(questions, 1, share, 0, 0) for i in r]
    assert sum(questions[i].negative for i in seen) == count
    assert sorted(i for i in seen if not questions[i].negative) == [i for i in range(24) if i % 3 != 2]


def _turn(text):
    return [{"role": "user", "content": text}]
