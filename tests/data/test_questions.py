"""Question files: what is read, and what every mistake is answered with."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from qzoom.data.questions import load_picture, open_questions, read_questions
from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.store.schema import Turn

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
    first, second = read_questions(path).questions
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
    first, second = read_questions(write(folder, GOOD, picture)).questions
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


def test_an_id_used_twice_names_both_lines(folder):
    with pytest.raises(DataError, match="line 3: the id 'a' is already on line 1"):
        read_questions(write(folder, GOOD, GOOD | {"id": "b"}, GOOD))


def test_bad_lines_can_be_skipped_and_are_counted(folder):
    path = write(folder, GOOD, *(line for line, _ in MISTAKES), GOOD, GOOD | {"id": "z"})
    found = read_questions(path, skip_bad=True)
    assert [q.name for q in found.questions] == ["a", "z"]
    assert [number for number, _ in found.skipped] == list(range(2, len(MISTAKES) + 3))
    assert "already on line 1" in found.skipped[-1][1]


def test_bytes_that_are_no_text_are_named(folder):
    path = folder / "q.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_questions(path)


def test_files_without_questions_are_refused(folder):
    with pytest.raises(DataError, match="no questions that can be used"):
        read_questions(write(folder, "", " "))
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(folder / "missing.jsonl")


def test_drawn_pictures_come_in_the_same_form():
    found = open_questions(["documents:5:2", "scenes:7:1"], per_picture=3)
    assert [q.name for q in found.questions] == ["documents:5", "documents:6", "scenes:7"]
    assert [q.mode for q in found.questions] == ["text", "text", "natural"]
    assert all(len(q.turns) == 3 and q.turns[0].answers for q in found.questions)
    assert min(load_picture(found.questions[0]).size_px) > 100
    assert open_questions(["documents:5:2"], per_picture=3).questions == found.questions[:2]


@pytest.mark.parametrize("name", ["documents:5", "documents:a:2", "scenes:1:0", "documents:2147483640:10"])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(ConfigError):
        open_questions([name])


def test_one_question_from_two_sets_is_refused(folder):
    path = write(folder, GOOD)
    with pytest.raises(DataError, match="comes from two of the given sets"):
        open_questions([str(path), str(path)])


def test_a_picture_that_has_gone_is_named(folder):
    (question,) = read_questions(write(folder, GOOD)).questions
    (folder / "moved").mkdir()
    (folder / "one.png").rename(folder / "moved" / "one.png")
    with pytest.raises(ImageError, match=r"one.png of question 'a' is missing"):
        load_picture(question)
    assert load_picture(question, folder / "moved").size_px == (40, 30)
