import json

import pytest

from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.store import AnswerFile
from tests.evaluation.samples import row

SETTINGS = {"zoom": "never", "model": {"weights": "abc", "config": {"shared_layers": 3}}, "limits": (4, 144)}


def pair(name):
    return [row(picture=name, index=i, count=2) for i in range(2)]


def filled(path):
    """A file with the answers about two pictures."""
    file = AnswerFile(path, SETTINGS)
    file.append(pair("a"))
    file.append(pair("b"))
    return path


def test_rows_come_back(tmp_path):
    path = filled(tmp_path / "new" / "run.jsonl")
    again = AnswerFile(path, SETTINGS)
    assert again.rows == pair("a") + pair("b")
    assert again.pictures() == {"a", "b"}
    again.append(pair("c"))
    assert AnswerFile(path, SETTINGS).pictures() == {"a", "b", "c"}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 7
    assert list(path.parent.iterdir()) == [path]


def test_every_broken_end_is_dropped(tmp_path):
    path = filled(tmp_path / "run.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    one, two = len(b"".join(lines[:3])), len(whole)
    for cut in range(len(lines[0]), len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        left = AnswerFile(path, SETTINGS)
        assert left.pictures() == ({"a", "b"} if cut == two else {"a"} if cut >= one else set())
        left.append(pair("z"))
        assert AnswerFile(path, SETTINGS).pictures() == left.pictures()


def test_fresh_starts_anew(tmp_path):
    path = filled(tmp_path / "run.jsonl")
    assert AnswerFile(path, SETTINGS, fresh=True).rows == []
    assert AnswerFile(path, SETTINGS).rows == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zoom": "auto"}, "zoom was 'never', is 'auto'"),
        ({"model": {"weights": "abd", "config": {"shared_layers": 3}}}, "model.weights was 'abc', is 'abd'"),
        ({"limits": None}, "limits was [4, 144], is None"),
        ({"more": 1}, "more was None, is 1"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, said):
    path = filled(tmp_path / "run.jsonl")
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        AnswerFile(path, SETTINGS | change)
    assert said in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "data", [b"my notes\n", b'{"id": 1}\n', b"[1]\n", b"\xff\xfe\n", b'{"schema": 99, "settings": {}}\n', b"no end"]
)
def test_other_files_are_left_alone(tmp_path, data):
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match="--fresh"):
        AnswerFile(path, SETTINGS)
    assert path.read_bytes() == data


@pytest.mark.parametrize(("order", "said"), [([1, 2, 1, 2], "twice"), ([2], "out of order"), ([1, 3], "out of order")])
def test_mixed_up_rows_name_their_line(tmp_path, order, said):
    path = filled(tmp_path / "run.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *(lines[i] for i in order)]))
    with pytest.raises(DataError, match=said) as caught:
        AnswerFile(path, SETTINGS)
    assert "line " in str(caught.value)


def test_a_damaged_row_names_its_line(tmp_path):
    path = filled(tmp_path / "run.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{oops}\n", *lines[3:]]))
    with pytest.raises(DataError, match="line 3"):
        AnswerFile(path, SETTINGS)


def test_the_first_line_says_what_was_run(tmp_path):
    path = tmp_path / "run.jsonl"
    AnswerFile(path, SETTINGS, about={"model": "tiny"})
    header = json.loads(path.read_text(encoding="utf-8"))
    assert header["about"] == {"model": "tiny"}
    assert header["settings"]["zoom"] == "never"
    assert AnswerFile(path, SETTINGS, about={"model": "another name"}).rows == []
