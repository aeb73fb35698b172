import json

from tests.evaluation.samples import receipt, write_split


def test_figures_files_and_comparison(here, checkpoint, tmp_path):
    data = write_split(tmp_path / "data", [receipt("a"), receipt("b", 90, 260), receipt("c", 120, 120)])
    words = ("--data", data, "--model", checkpoint, "--device", "cpu", "--max-visual-tokens", 24)
    result = here("eval", "coverage", *words, "--json", "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert (found["n"], found["pictures"], found["errors"]) == (6, 3, 0)
    assert "rows" not in found
    assert found["measures"]["relative"]["layer"]["lift"] > 0
    assert 0 <= found["measures"]["raw"]["head"]["hit"] <= 1
    assert len(found["depths"]) == len(found["measures"]["raw"]["lift"])
    kept = json.loads((tmp_path / "run" / "coverage.json").read_text(encoding="utf-8"))
    assert len(kept["rows"]) == 6
    assert (tmp_path / "run" / "coverage.png").read_bytes().startswith(b"\x89PNG")
    table = here("eval", "coverage", *words, "--compare", tmp_path / "run")
    assert table.code == 0, table.err
    assert table.out.splitlines()[0].startswith("6 questions with a place, 3 pictures")
    assert "difference +0.000 (+0.000 to +0.000)" in table.out
    assert (kept["max_visual_tokens"], kept["split"]) == (24, "dev")
    other = (*words[:-1], 12, "--compare", tmp_path / "run")
    here("eval", "coverage", *other).refuses(1, "max_visual_tokens is 12 here and 24 there")


def test_complaints(here, checkpoint, tmp_path):
    here("eval", "coverage").refuses(2, "--data")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for output, code, said in (("file", 2, "is a file; name a folder"), ("file/in", 1, "cannot be made")):
        words = ("--count", 1, "--model", "org/none", "-o", tmp_path / output)  # refused before a model is looked for
        here("eval", "coverage", "scenes", *words).refuses(code, said)
    here("eval", "coverage", "scenes", "--count", 1, "--compare", tmp_path).refuses(1, "qzoom eval coverage -o")
