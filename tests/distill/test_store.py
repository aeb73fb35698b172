"""The files of the steps: what survives a torn write, what is refused."""

import json

import pytest

from qzoom.distill.store import StepStore
from qzoom.errors import ConfigError, DataError

KEYS = [f"{n:020x}" for n in range(50)]


def open_store(tmp_path, settings=None, **options):
    return StepStore(tmp_path / "ask.jsonl", "ask", settings or {"a": {"b": 1}}, **options)


def filled(tmp_path, count=3):
    store = open_store(tmp_path)
    for key in KEYS[:count]:
        store.add(key, [{"text": f"é {key}"}, {}])
    store.close()
    return tmp_path / "ask.jsonl"


def test_what_was_added_is_found_in_any_order_also_later(tmp_path):
    filled(tmp_path, 50)
    store = open_store(tmp_path)
    assert len(store) == 50
    for key in reversed(KEYS):
        assert store.get(key) == [{"text": f"é {key}"}, {}]
    assert store.get("f" * 20) is None
    store.close()


def test_keys_that_share_their_first_digits_are_told_apart(tmp_path):
    store = open_store(tmp_path)
    one, two = "a" * 16 + "0000", "a" * 16 + "0001"
    store.add(one, [1])
    store.close()
    store = open_store(tmp_path)
    assert two not in store
    store.add(two, [2])
    assert (store.get(one), store.get(two)) == ([1], [2])
    store.close()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_cut_off_and_the_rest_stays(tmp_path, cut):
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    store = open_store(tmp_path)
    assert [key in store for key in KEYS[:3]] == [True, True, False]
    store.add(KEYS[2], ["again"])
    store.close()
    assert [json.loads(line).get("in") for line in path.read_text().splitlines()[1:]] == KEYS[:3]


def test_damage_inside_is_named_with_its_line(tmp_path):
    path = filled(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"garbage", *lines[1:]]))
    with pytest.raises(DataError, match=r"ask\.jsonl, line 2: not a result"):
        open_store(tmp_path)
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b'"text"', b'"text'), *lines[2:]]))
    store = open_store(tmp_path)
    with pytest.raises(DataError, match="is damaged"):
        store.get(KEYS[0])
    store.close()


def test_an_input_is_worked_on_once(tmp_path):
    filled(tmp_path)
    store = open_store(tmp_path)
    with pytest.raises(DataError, match="there already"):
        store.add(KEYS[0], [])
    store.close()


def test_other_settings_are_named(tmp_path):
    filled(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.b was 1, is 2.*--fresh --step ask"):
        open_store(tmp_path, {"a": {"b": 2}})
    store = open_store(tmp_path, {"a": {"b": 2}}, fresh=True)
    assert len(store) == 0
    store.close()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "ask.jsonl").write_text('{"something": "else"}\n')
    with pytest.raises(DataError, match="not a file of the step ask"):
        open_store(tmp_path)
