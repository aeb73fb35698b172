import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qzoom.errors import ConfigError, DataError
from qzoom.store.records import GATHER, RecordStore, RecordWriter, StoreLock, log_facts, start_store
from qzoom.store.schema import Attention, Provenance, Question, Skip, Turn
from tests.store.writer_process import records_of, until_told

MADE_BY = Provenance("m", "abc", "main", "plain", 3, {"tokens": 64})


@pytest.fixture
def folder(tmp_path):
    start_store(tmp_path / "store", "regions", {"a": 1, "b": {"c": [1, 2]}}, MADE_BY)
    return tmp_path / "store"


def fill(folder, numbers, writer=0):
    with RecordWriter(folder, writer) as out:
        for number in numbers:
            out.append(f"s{number}", records_of(number))


def check(folder, numbers):
    """Every sample is there once, with its own tensors."""
    store = RecordStore(folder)
    assert sorted(store.samples) == sorted(f"s{n}" for n in numbers)
    found = {record.response: stored for stored, record in store.of_kind(Attention)}
    assert sorted(found) == sorted(f"r{n}" for n in numbers)
    for number in numbers:
        stored = found[f"r{number}"]
        assert (store.tensor(stored, "grounding") == number).all()
        assert (store.tensor(stored, "sink") == -number).all()
    return store


def test_returns_what_was_written(folder):
    fill(folder, range(5))
    store = check(folder, range(5))
    assert (store.provenance, store.settings) == (MADE_BY, {"a": 1, "b": {"c": [1, 2]}})
    assert store.purpose == "regions"
    assert len(store) == 10
    first = store.samples["s0"]
    assert store.get(first[0]).record == Skip("q0", "none")
    with pytest.raises(DataError, match="holds no record 'nothing'"):
        store.get("nothing")


def test_one_record_in_two_samples_is_found_once(folder):
    question = Question("q", "a.png", (Turn("?"),))
    with RecordWriter(folder) as out:
        one = out.append("a", [(question, {})])
        two = out.append("b", [(question, {}), (Skip("q", "x"), {})])
    assert one[0] == two[0]
    store = RecordStore(folder)
    assert len(store) == 2
    assert [record for _, record in store.of_kind(Question)] == [question]


def test_parts_are_gathered_into_shards(folder):
    fill(folder, range(GATHER + 3))
    names = sorted(path.name for path in (folder / "tensors").iterdir())
    assert names == ["shard-00-000001.safetensors", "shard-00-000002.safetensors"]
    check(folder, range(GATHER + 3))
    fill(folder, range(GATHER + 3, GATHER + 6))
    check(folder, range(GATHER + 6))


def test_a_rerun_continues_and_knows_what_is_done(folder):
    fill(folder, range(3))
    with RecordWriter(folder) as out:
        assert out.done == {"s0", "s1", "s2"}
        with pytest.raises(DataError, match="'s1' is there already"):
            out.append("s1", records_of(1))
        out.append("s3", records_of(3))
    check(folder, range(4))


def test_a_broken_end_is_cut_off(folder):
    fill(folder, range(3))
    path = folder / "records-00.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) - 1, len(lines[-1])):
        path.write_bytes(whole[:-cut])
        assert sorted(RecordStore(folder).samples) == ["s0", "s1"]
        assert path.stat().st_size == len(whole) - cut  # reading mends nothing
        fill(folder, [2])
        check(folder, range(3))


def test_leftovers_of_a_killed_writer_are_removed(folder):
    fill(folder, [0])
    tensors = folder / "tensors"
    (tensors / "part-00-000000007.safetensors.1.partial").write_bytes(b"half")
    with RecordWriter(folder) as out:
        out._files.write({"0" * 20 + ".grounding": np.zeros((1, 1), np.float32)})  # then it is killed
        out._files._parts = []
    assert len(list(tensors.glob("part-*"))) == 2
    fill(folder, [1])
    check(folder, [0, 1])
    assert not list(tensors.glob("*.partial"))
    assert [path.name for path in tensors.iterdir()] == ["shard-00-000001.safetensors"]


def test_a_gathering_that_was_cut_short_duplicates_nothing(folder):
    with RecordWriter(folder) as out:
        out.append("s0", records_of(0))
        out.append("s1", records_of(1))
        kept = {path: path.read_bytes() for path in (folder / "tensors").glob("part-*")}
    for path, data in kept.items():  # the shard was written, the parts not yet removed
        path.write_bytes(data)
    check(folder, [0, 1])
    fill(folder, [2])
    check(folder, range(3))
    assert len(list((folder / "tensors").glob("part-*"))) == 1


def test_several_writers_fill_one_store_each_under_its_number(folder):
    fill(folder, [0, 2], writer=0)
    fill(folder, [1, 3], writer=1)
    check(folder, range(4))
    fill(folder, [4], writer=2)
    check(folder, range(5))
    with RecordWriter(folder), pytest.raises(ConfigError, match="Another process is writing"):
        RecordWriter(folder)
    RecordWriter(folder).close()


def test_of_two_records_of_one_sample_the_first_counts(folder):
    fill(folder, [0, 1])
    log = folder / "records-00.jsonl"
    header, *lines = log.read_text().splitlines(keepends=True)
    log.write_text(header + lines[0])
    with RecordWriter(folder, 1) as out:
        out.append("s1", records_of(5))  # by a command that did not see that "s1" was being labelled
        out.append("s2", records_of(2))
    log.write_text(header + lines[0] + lines[1])
    check(folder, range(3))
    with RecordWriter(folder, 1) as out:
        assert out.done == {"s0", "s1", "s2"}
        out.append("s3", records_of(3))
    check(folder, range(4))


def test_a_lock_is_held_until_the_last_process_that_was_given_it_ends(folder):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with StoreLock(folder) as lock:
        with pytest.raises(ConfigError, match=rf"Another command, .*is labelling into {folder}; wait for it"):
            StoreLock(folder)
        process = context.Process(target=until_told, args=(theirs, lock), daemon=True)
        process.start()
        assert ours.recv() == "started"
    with pytest.raises(ConfigError, match="is labelling into"):
        StoreLock(folder)
    ours.send("end")
    process.join()
    assert process.exitcode == 0
    with StoreLock(folder):
        fill(folder, [0])


def test_changed_settings_are_named_and_fresh_starts_over(folder):
    with pytest.raises(ConfigError, match=r"settings.b.c was \[1, 2\], is \[1, 3\].*--fresh"):
        start_store(folder, "regions", {"a": 1, "b": {"c": [1, 3]}}, MADE_BY)
    with pytest.raises(ConfigError, match=r"provenance.weights was 'abc', is 'xyz'"):
        start_store(folder, "regions", {"a": 1, "b": {"c": [1, 2]}}, Provenance("m", "xyz", "main", "plain", 3))
    with pytest.raises(DataError, match=r"holds regions, not gate.*--fresh"):
        start_store(folder, "gate", {"a": 1, "b": {"c": [1, 2]}}, MADE_BY)
    start_store(folder, "regions", {"a": 1, "b": {"c": [1, 2]}}, MADE_BY)
    fill(folder, range(3))
    (folder / "notes.txt").write_text("mine")
    start_store(folder, "gate", {}, MADE_BY, fresh=True)
    assert RecordStore(folder).samples == {}
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list((folder / "tensors").iterdir())


def test_stores_from_before_a_setting_go_on_without_it(folder):
    settings = {"a": 1, "b": {"c": [1, 2]}}
    fill(folder, [0])
    start_store(folder, "regions", settings, MADE_BY, added_later={"zoom": "x"})
    assert RecordStore(folder).settings == settings
    start_store(folder, "regions", settings, MADE_BY, added_later={"zoom": "x"}, fresh=True)
    assert RecordStore(folder).settings == settings | {"zoom": "x"}
    start_store(folder, "regions", settings, MADE_BY, added_later={"zoom": "x"})
    with pytest.raises(ConfigError, match=r"settings.zoom was 'x', is 'y'"):
        start_store(folder, "regions", settings, MADE_BY, added_later={"zoom": "y"})


def test_a_writer_notes_facts_before_its_first_record(folder):
    for judge in ("one", "two", "three", "four"):
        with RecordWriter(folder, 7, facts={"judge": judge}) as out:
            if judge == "two":
                assert log_facts(folder, 7) == {}
                out.append("s0", records_of(0))
    assert log_facts(folder, 7) == {"judge": "two"}
    check(folder, [0])


@pytest.mark.parametrize("writer", [0, 1])
def test_fresh_leaves_the_records_of_a_running_writer(folder, writer):
    fill(folder, [0])
    with RecordWriter(folder, writer) as out:
        out.append("s1", records_of(1))
        with pytest.raises(ConfigError, match=rf"Another process is writing to .*records-0{writer}\.jsonl"):
            start_store(folder, "gate", {}, MADE_BY, fresh=True)
        out.append("s2", records_of(2))
    check(folder, range(3))
    start_store(folder, "gate", {}, MADE_BY, fresh=True)
    assert RecordStore(folder).samples == {}
    assert [path.name for path in folder.glob("records-*")] == ["records-00.jsonl"]


def test_damage_in_the_middle_is_named(folder):
    fill(folder, range(3))
    path = folder / "records-00.jsonl"
    complete = path.read_text()
    for text, where in (
        (complete.replace("q1", "q9"), "sample 's1'"),
        (complete.replace('"kind"', '"kins"', 1), "sample 's0'"),
        (complete.replace('{"key"', '["key"', 1), "line 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"records-00.jsonl, {where}"):
            RecordStore(folder)
    path.write_text(complete)
    (folder / "records-01.jsonl").write_text(complete.splitlines()[0].replace('"a": 1', '"a": 2') + "\n")
    with pytest.raises(DataError, match=r"records-01.jsonl was made in another way"):
        RecordStore(folder)


def test_changed_and_lost_tensors_are_named(folder):
    from safetensors.numpy import load_file, save_file

    fill(folder, range(2))
    (shard,) = (folder / "tensors").iterdir()
    tensors = load_file(shard)
    save_file({name: array + 1 for name, array in tensors.items()}, shard)
    store = RecordStore(folder)
    stored = next(s for s, _ in store.of_kind(Attention))
    with pytest.raises(DataError, match="was changed"):
        store.tensor(stored, "grounding")
    shard.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no readable safetensors file"):
        RecordStore(folder)
    shard.unlink()
    with pytest.raises(DataError, match="lacks the tensor"):
        RecordStore(folder).tensor(stored, "grounding")


def test_other_folders_are_refused(tmp_path, folder):
    with pytest.raises(DataError, match=r"records-00.jsonl is missing"):
        RecordStore(tmp_path)
    fill(folder, [0])
    (folder / "records-00.jsonl").rename(folder / "records-01.jsonl")
    with pytest.raises(DataError, match=r"has records but no records-00.jsonl"):
        start_store(folder, "regions", {}, MADE_BY)


def test_tensors_must_fit_the_schema(folder):
    with RecordWriter(folder) as out:
        maps = {"grounding": np.zeros((2, 2), np.float64), "sink": np.zeros((2, 2), np.float32)}
        with pytest.raises(DataError, match="takes the tensors"):
            out.append("s", [(Attention("r", ()), maps)])
        maps["grounding"] = np.full((2, 2), np.nan, np.float32)
        with pytest.raises(DataError, match="not finite"):
            out.append("s", [(Attention("r", ()), maps)])
        assert out.done == set()


def start(folder, count, writer=0):
    root = Path(__file__).parents[2]
    words = [sys.executable, "-m", "tests.store.writer_process", str(folder), str(count), str(writer)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root, text=True)


def test_kill_9_loses_at_most_the_sample_in_flight(tmp_path):
    folder = tmp_path / "store"
    said = 0
    for wait_for in (1, 3, 7, 20, 90):
        process = start(folder, 1_000_000)  # far more than it gets to
        lines = []
        for _ in range(wait_for):
            lines.append(int(process.stdout.readline()))
        process.kill()
        lines += [int(line) for line in process.stdout.read().split()]
        process.wait()
        assert lines[0] >= said  # nothing that was there is made again
        said = lines[-1] + 1
        there = len(RecordStore(folder).samples)
        assert said <= there <= said + 1  # what was said is there; at most one more was
        check(folder, range(there))
        said = there
    process = start(folder, said + 50)
    assert len(process.stdout.read().split()) == 50
    assert process.wait() == 0
    check(folder, range(said + 50))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from qzoom.errors import DataError
from qzoom.store.records import RecordWriter
from tests.store.writer_process import records_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
out = RecordWriter(Path(sys.argv[1]))
try:
    for number in range(100):
        out.append(f"s{number}", records_of(number))
        print(number)
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_loses_nothing(folder):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True, cwd=root)
    *numbers, sentence = done.stdout.splitlines()
    assert "cannot be written" in sentence
    assert "run again" in sentence
    assert len(numbers) >= 2
    check(folder, range(len(numbers)))
    fill(folder, range(len(numbers), 12))
    check(folder, range(12))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_one_sentence(folder):
    folder.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        RecordWriter(folder)
