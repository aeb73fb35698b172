import contextlib
import json

import pytest

from qzoom.errors import ConfigError, DataError
from qzoom.serving.batch_tables import open_table

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def lines_of(folder, rows):
    source = folder / "in.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), source)
    with open_table(source, folder / "out.parquet") as lines:
        found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert not lines.exists()
    return found


def test_fields_that_a_struct_lacks_are_left_out(tmp_path):
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    bodies = [{"messages": [{"role": "user", "content": content}]}, {"messages": [], "max_tokens": 3}]
    found = lines_of(tmp_path, [{"custom_id": str(i), "body": body} for i, body in enumerate(bodies)])
    assert [line["body"] for line in found] == bodies


def test_turns_and_questions_are_columns_too(tmp_path):
    lines = [
        {"id": "a", "image": "data:,", "question": "?"},
        {"id": "b", "image": "data:,", "turns": [{"question": "?"}, {"question": "??", "answer": "x"}]},
        {"id": "c", "image": "data:,", "questions": [{"question": "?"}]},
    ]
    rows = [{name: line.get(name) for name in ("id", "image", "question", "turns", "questions")} for line in lines]
    assert lines_of(tmp_path, rows) == lines
    assert lines_of(tmp_path, [{"id": None, "image": "data:,", "turns": [{"question": "?"}]}])[0]["id"] is None


def test_what_is_no_json_is_named_by_row(tmp_path):
    rows = [{"custom_id": "a", "body": "{}"}, {"custom_id": "b", "body": "{}"}]
    assert len(lines_of(tmp_path, rows)) == 2
    with pytest.raises(DataError, match=r"in.parquet, row 1 cannot be a line of JSON .*bytes"):
        lines_of(tmp_path, [{"custom_id": "a", "body": {"messages": b"?"}}])
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_second_run_leaves_the_lines_of_the_first(tmp_path):
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(pa.Table.from_pylist([{"custom_id": "a", "body": "{}"}]), source)
    with contextlib.ExitStack() as first:
        lines = first.enter_context(open_table(source, output))
        before = lines.read_bytes()
        with pytest.raises(ConfigError, match="Another process is writing"), open_table(source, output):
            pass
        assert lines.read_bytes() == before
    assert not lines.exists()
    lines.write_text("left by a run that was killed\n")
    with open_table(source, output) as lines:
        assert lines.read_bytes() == before
