import fcntl

import pytest

from qzoom.errors import ConfigError, DataError
from qzoom.store.log import Log, LogWriter, atomic_path, open_locked, write_atomic

KEYS = [f"{n:020x}" for n in range(50)]
SETTINGS = {"zoom": "never", "model": {"weights": "abc", "config": {"shared_layers": 3}}, "limits": (4, 144)}


def open_log(folder, settings=None, **options):
    return LogWriter(folder / "new" / "ask.jsonl", "ask", settings or SETTINGS, **options)


def filled(folder, count=3):
    with open_log(folder, about={"model": "tiny"}) as log:
        for key in KEYS[:count]:
            log.append(key, [{"text": f"é {key}"}, {}])
    return folder / "new" / "ask.jsonl"


def test_what_was_added_is_found_in_any_order_also_later(tmp_path):
    path = filled(tmp_path, 50)
    with open_log(tmp_path) as log:
        assert len(log) == 50
        for key in reversed(KEYS):
            assert log.get(key) == [{"text": f"é {key}"}, {}]
        assert log.get("f" * 20) is None
        log.append("more", [1])
        assert [key for key, _ in log] == [*KEYS, "more"]
    log = Log(path, "ask")
    assert (log.purpose, log.settings, log.about) == ("ask", SETTINGS | {"limits": [4, 144]}, {"model": "tiny"})
    assert log.get("more") == [1]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("key", ['a "b", "items": [', "é\n\\", "\ud800", "", "a/b:c"])
def test_every_text_is_a_key(tmp_path, key):
    path = filled(tmp_path)
    with open_log(tmp_path) as log:
        log.append(key, ["\ud800", [1]])
    assert Log(path).get(key) == ["\ud800", [1]]


def test_long_lines_are_read_whole(tmp_path):
    path = filled(tmp_path)
    with open_log(tmp_path) as log:
        log.append("long", ["x" * 1_000_000])
    assert Log(path).get("long") == ["x" * 1_000_000]


def test_every_torn_end_is_cut_off(tmp_path):
    path = filled(tmp_path)
    complete = path.read_bytes()
    lines = complete.splitlines(keepends=True)
    ends = [len(b"".join(lines[:n])) for n in range(1, 5)]
    for cut in range(ends[0], len(complete) + 1, 7):
        path.write_bytes(complete[:cut])
        there = sum(end <= cut for end in ends) - 1
        assert len(Log(path)) == there
        assert path.stat().st_size == cut  # reading repairs nothing
        with open_log(tmp_path) as log:
            assert len(log) == there
            log.append("z", [])
        assert [key for key, _ in Log(path)] == [*KEYS[:there], "z"]


def test_of_repeated_keys_the_last_line_counts(tmp_path):
    path = tmp_path / "log.jsonl"
    with LogWriter(path, "ask", {}, repeats=True) as log:
        for items in ([1], [2]):
            log.append("a", items)
            log.append("b", items * 2)
        log.append("a", [3])
        assert list(log) == [("b", [2, 2]), ("a", [3])]
    with LogWriter(path, "ask", {}, repeats=True) as log:
        assert (len(log), log.get("a")) == (2, [3])
    assert list(Log(path, repeats=True)) == [("b", [2, 2]), ("a", [3])]


def test_damage_inside_is_named_with_its_line(tmp_path):
    path = filled(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"garbage", *lines[1:]]))
    with pytest.raises(DataError, match=r"ask\.jsonl, line 2: not a line of this log"):
        open_log(tmp_path)
    path.write_bytes(b"\n".join([*lines[:3], lines[1], *lines[3:]]))
    with pytest.raises(DataError, match=f"{KEYS[0]}' is there twice"):
        open_log(tmp_path)
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b'"text"', b'"text'), *lines[2:]]))
    with open_log(tmp_path) as log, pytest.raises(DataError, match=f"the line of {KEYS[0]} is damaged"):
        log.get(KEYS[0])
    with pytest.raises(DataError, match="line 2 is damaged"):
        list(Log(path))


def test_keys_are_added_once_by_one_writer(tmp_path):
    path = filled(tmp_path)
    with open_log(tmp_path) as log:
        with pytest.raises(DataError, match="there already"):
            log.append(KEYS[0], [])
        for fresh in (False, True):
            with pytest.raises(ConfigError, match=r"Another process is writing to .*ask.jsonl"):
                open_log(tmp_path, fresh=fresh)
        log.append("z", [])
    assert len(Log(path)) == 4


def test_fresh_starts_anew(tmp_path):
    path = filled(tmp_path)
    open_log(tmp_path, {"a": 2}, fresh=True).close()
    assert len(Log(path)) == 0
    assert Log(path).settings == {"a": 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"zoom": "auto"}, "zoom was 'never', is 'auto'"),
        ({"model": {"weights": "abd", "config": {"shared_layers": 3}}}, "model.weights was 'abc', is 'abd'"),
        ({"limits": None}, "limits was [4, 144], is None"),
        ({"more": 1}, "more was None, is 1"),
    ],
)
def test_other_settings_are_named(tmp_path, change, sentence):
    path = filled(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_log(tmp_path, SETTINGS | change)
    assert sentence in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert path.read_bytes() == before
    with open_log(tmp_path, about={"model": "another name"}) as log:
        assert log.about == {"model": "tiny"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"my notes\n", "does not start like a file of ask"),
        (b'{"id": 1}\n', "does not start like"),
        (b"[1]\n", "does not start like"),
        (b"\xff\xfe\n", "does not start like"),
        (b"no end", "does not start like"),
        (b'{"schema": 1, "settings": {}}\n', "has schema 1.*convert_stores"),
        (b'{"schema": 2, "purpose": "answers", "settings": {}, "about": {}}\n', "holds answers, not ask"),
    ],
)
def test_other_files_are_left_alone(tmp_path, data, message):
    path = tmp_path / "new" / "ask.jsonl"
    path.parent.mkdir()
    path.write_bytes(data)
    for read in (open_log, lambda folder: Log(path, "ask")):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path)
        assert "--fresh" in str(caught.value)
    assert path.read_bytes() == data


def test_folders_and_missing_files_are_one_sentence(tmp_path):
    (tmp_path / "new" / "ask.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder"):
        open_log(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        Log(tmp_path / "nothing.jsonl")


def test_an_interrupted_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_atomic(path, "é")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as partial:
        partial.write_text("half" * (1 // 0))
    assert path.read_text() == "é"
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/report.json cannot be written \(.*\); check space"):
        write_atomic(tmp_path / "file" / "report.json", b"")


def test_the_lock_is_that_of_the_file_with_this_name(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    take = fcntl.flock

    def replaced_before(file, how):
        write_atomic(path, b"of another process\n")
        take(file, how)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with pytest.raises(ConfigError, match="Another process is writing"):
        open_locked(path, fresh=True)
    assert path.read_bytes() == b"of another process\n"
