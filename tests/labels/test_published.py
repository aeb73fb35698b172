import collections
import io
import os
import pickle
import pickletools
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import DataError
from qzoom.labels import published
from qzoom.labels.published import convert_published, read_pickle
from qzoom.store.records import RecordStore, missing_samples
from qzoom.store.schema import Question, RegionLabel, Skip


class Runs:
    """Unpickling it would call a function."""

    def __init__(self, function, *arguments):
        self._reduced = (function, arguments)

    def __reduce__(self):
        return self._reduced


class Subclass(np.ndarray):
    pass


def hostile(marker):
    numbers = np.zeros(3).__reduce__()
    return {
        "system": Runs(os.system, f"touch {marker}"), "eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        "exec in a list": [1, {"a": (Runs(exec, f"open({str(marker)!r}, 'w')"),)}],
        "getattr": Runs(getattr, "x", "upper"), "open": Runs(open, str(marker), "w"),
        "import": Runs(__import__, "os"), "numpy load": Runs(np.load, str(marker)),
        "numpy fromfile": Runs(np.fromfile, str(marker)),
        "array of objects": np.array([Runs(os.system, f"touch {marker}"), 1], dtype=object),
        "subclass": Runs(numbers[0], Subclass, (0,), b"b"), "big array": Runs(numbers[0], np.ndarray, (2**40,), b"b"),
        "calls ndarray": Runs(np.ndarray, (2**40,)), "structured": np.zeros(2, dtype=[("a", "f4")]),
        "class": collections.Counter("abc"), "function": os.system, "complex": 1j,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(hostile("x")))
@pytest.mark.parametrize("protocol", [2, 5])
def test_hostile_pickles_do_nothing(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps([hostile(marker)[name]], protocol))
    with pytest.raises(DataError, match=r"not a file of labels: it holds .*nothing of it was used"):
        read_pickle(path)
    assert not marker.exists()


def test_array_states_that_would_read_past_their_data_are_refused(tmp_path):
    good = np.arange(6, dtype=np.float32)
    data = pickle.dumps([good], 2)
    shape = pickletools.optimize(data)
    path = tmp_path / "labels.pkl"
    changed = shape.replace(b"K\x06\x85", b"K\x60\x85")
    assert changed != shape
    path.write_bytes(changed)
    with pytest.raises(DataError, match="do not fit its shape"):
        read_pickle(path)


def test_a_pickle_that_never_ends_or_wants_all_memory_is_stopped(tmp_path):
    path = tmp_path / "labels.pkl"
    billion = b"\x80\x02]q\x00(" + b"h\x00" * 10 + b"e."  # a list that holds itself
    path.write_bytes(billion)
    with pytest.raises(DataError, match="nested more than 32 deep"):
        read_pickle(path)
    nested = b"\x80\x04" + b"\x96" + (2**34).to_bytes(8, "little") + b"x" * 10  # claims 16 GiB of bytes
    path.write_bytes(nested)
    with pytest.raises(DataError, match=r"damaged|more memory"):
        read_pickle(path, memory_bytes=2 * 2**30)
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")  # a memo of 2**31 places
    with pytest.raises(DataError, match="more memory"):
        read_pickle(path, memory_bytes=2 * 2**30)


def test_memory_is_watched_where_the_system_does_not_limit_it(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_LIMITS_ADDRESS_SPACE", False)
    large = "import sys; kept = b'x' * 200_000_000; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", large], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with pytest.raises(DataError, match="needs more memory than is allowed"):
        published._watched(child, tmp_path, 100_000_000, time.monotonic() + 500)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps([1, 2])[:-3]])
def test_damaged_files_are_refused(tmp_path, data):
    path = tmp_path / "labels.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match="it is damaged"):
        read_pickle(path)
    with pytest.raises(DataError, match="no such file"):
        read_pickle(tmp_path / "none.pkl")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_and_containers_come_through(tmp_path, protocol):
    big_endian = np.arange(4, dtype=">f4").reshape(2, 2)
    values = [
        {"a": np.eye(2, dtype=np.float16), "n": np.float32(0.5), "t": (1, "x", None, True, 2.5)},
        collections.OrderedDict(b=np.asfortranarray(np.arange(6).reshape(2, 3))),
        big_endian,
    ]
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps(values, protocol))
    content, arrays = read_pickle(path)
    assert (content[0]["n"], content[0]["t"]) == (0.5, [1, "x", None, True, 2.5])
    assert np.array_equal(arrays[content[0]["a"]["__array__"]], np.eye(2))
    assert np.array_equal(arrays[content[1]["b"]["__array__"]], np.arange(6).reshape(2, 3))
    assert np.array_equal(arrays[content[2]["__array__"]], [[0, 1], [2, 3]])


def entry(image="a.png", peak=(1, 2)):
    sink, grounding = np.zeros((6, 6), np.float32), np.zeros((6, 6), np.float32)
    grounding[peak] = 0.5
    return {
        "image": image, "prompt": "What is it?", "text": "a cat", "question_id": "7", "mode": "textual",
        "dataset": "gqa", "sink_attn": sink, "grounding_attn_o2i": grounding,
    }  # fmt: skip


def test_entries_become_labels_and_bad_ones_are_counted(tmp_path):
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = [entry("bad.png"), {"image": "a.png"}, "x", entry() | {"sink_attn": [1, 2]}, entry(peak=(0, 0))]
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps([entry(), *bad]))
    report = convert_published(path, tmp_path / "store", tmp_path, model="base")
    # the last one points at the padding of the wide picture, so nothing in it is foreground
    assert (report.questions, report.usable, report.skipped) == (6, 1, 4)
    assert "bad.png': it is not a picture" in report.reasons[0]
    store = RecordStore(tmp_path / "store")
    assert (store.provenance.model, store.provenance.weights) == ("base", "")
    stored, label = next(store.of_kind(RegionLabel))
    assert label.usable
    assert (label.text, label.size_px) == ("a cat", (60, 30))
    labels = store.tensor(stored, "labels")
    assert labels[1, 2] == 1
    assert (labels[[0, 5]] == 0).all()  # the padding is background
    assert labels[1, 1] == -100
    question = store.get(label.question).record
    assert isinstance(question, Question)
    assert (question.name, question.source, question.image) == ("7", "gqa", "a.png")
    assert len(list(store.of_kind(Skip))) == 4
    again = convert_published(path, tmp_path / "store", tmp_path, model="base")
    assert (again.usable, again.skipped) == (1, 4)  # a rerun adds nothing


def test_entries_whose_picture_is_missing_are_left_for_a_rerun(tmp_path):
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps([entry(), entry("later.png")]))
    report = convert_published(path, tmp_path / "store", tmp_path)
    assert (report.questions, report.skipped, report.unread) == (1, 0, 1)
    assert re.search(r"^entry 1: The picture .*later\.png of question '7' is missing", report.unread_reason)
    assert missing_samples(tmp_path / "store") == 1
    Image.new("RGB", (60, 30)).save(tmp_path / "later.png")
    report = convert_published(path, tmp_path / "store", tmp_path)
    assert (report.usable, report.skipped, report.unread, report.unread_reason) == (2, 0, 0, "")
    assert missing_samples(tmp_path / "store") == 0


def test_other_pickles_are_no_label_files(tmp_path):
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="holds no list of entries"):
        convert_published(path, tmp_path / "store", tmp_path)


def test_the_reader_itself_names_nothing_but_its_list():
    from qzoom.labels.unpickling import RefusedError, load_restricted

    class Sneaky(pickle.Pickler):
        def persistent_id(self, obj):
            return "outside" if obj == 5 else None

    stream = io.BytesIO()
    Sneaky(stream).dump([5])
    with pytest.raises(RefusedError, match="outside the file"):
        load_restricted(stream.getvalue())
