"""Files that qzoom wrote with schema 1 (kept in schema1/) are converted and hold what they held."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.convert_stores import convert
from qzoom.errors import DataError
from qzoom.store.log import Log
from qzoom.store.records import RecordStore, RecordWriter
from qzoom.store.schema import Attention, Question, Verdict
from tests.store.writer_process import records_of

KEPT = Path(__file__).with_name("schema1")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(KEPT, tmp_path / "kept")


def test_old_files_are_named_and_converted_once(folder):
    for path in ("answers/scenes.jsonl", "steps/ask.jsonl"):
        with pytest.raises(DataError, match=r"has schema 1.*convert_stores"):
            Log(folder / path)
    assert len(convert(folder)) == 4
    assert convert(folder) == []


def test_records_keep_ids_and_tensors(folder):
    lines = (folder / "records" / "records-00.jsonl").read_text().splitlines()
    convert(folder / "records")
    store = RecordStore(folder / "records")
    assert (store.purpose, store.settings["tokens"], store.provenance.weights) == ("regions", 25, "abc")
    assert all(json.loads(line)["id"] in store for line in lines)
    assert [record.name for _, record in store.of_kind(Question)] == ["q0", "q1", "q2", "q3"]
    for number, (stored, _) in enumerate(store.of_kind(Attention)):
        assert (store.tensor(stored, "grounding") == number).all()
    assert len(list(store.of_kind(Verdict))) == 4
    with RecordWriter(folder / "records", 1) as writer:
        writer.append("more", records_of(9))
    assert len(RecordStore(folder / "records").samples) == 5


def test_steps_and_answers_keep_keys_and_rows(folder):
    convert(folder / "steps")
    log = Log(folder / "steps" / "ask.jsonl", "ask")
    assert log.settings == {"seed": 3, "rules": {"a": [1, 2]}}
    assert log.get(f"{0:020x}") == []
    assert log.get(f"{2:020x}") == [{"text": "é 2"}, {"more": 2}]
    rows = [json.loads(line) for line in (folder / "answers" / "scenes.jsonl").read_text().splitlines()[1:]]
    convert(folder / "answers" / "scenes.jsonl")
    log = Log(folder / "answers" / "scenes.jsonl", "answers")
    assert (log.settings["questions"]["task"], log.about) == ("scenes", {"model": "tiny"})
    assert [row for _, items in log for row in items] == rows
