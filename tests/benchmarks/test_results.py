import json

from benchmarks.results import answer_files, main
from qzoom import QZoom
from qzoom.checkpoints.weights import weights_digest
from qzoom.store.log import LogWriter
from tests.evaluation.samples import row


def answers(path, zoom, task="receipts", rows=1):
    options = {"zoom": zoom, "coarse_tokens": {"min_tokens": 1, "max_tokens": 144}}
    file = LogWriter(path, "answers", {"questions": {"task": task}, "options": options}, about={"model": "tiny"})
    for number in range(rows):
        file.append(f"p{number}", [row(picture=f"p{number}").to_dict()])
    file.close()


def name_weights(results, weights):
    """A table of the ladder that names these."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "ladder.json").write_text(json.dumps({"about": {"weights": weights}}), encoding="utf-8")


WEIGHTS = "0123abcd01234567"
TABLES = "the tables above may be of a later one."


def written(tmp_path, *more):
    given = [
        "--runs", tmp_path / "runs", "--results", tmp_path / "docs" / "results", "--page", tmp_path / "docs/results.md",
    ]  # fmt: skip
    main([str(word) for word in [*given, *more]])
    return (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")


def test_a_skeleton_says_what_is_missing(tmp_path):
    text = written(tmp_path)
    for part in ("python -m benchmarks.ladder", "python -m benchmarks.baselines", "python -m benchmarks.ablations"):
        assert part in text
    assert "No answers" in text


def test_parts_and_charts(tmp_path):
    results = tmp_path / "docs" / "results"
    name_weights(results, WEIGHTS)
    (results / "ladder.md").write_text("## The ladder\n\ntable\n", encoding="utf-8")
    (results / "engine.md").write_text("# Engine\n", encoding="utf-8")
    root = tmp_path / "runs" / "0123abcd"
    answers(root / "ladder" / "receipts" / "receipts-plain-64.jsonl", "never")
    answers(root / "ladder" / "receipts" / "receipts-plain-100.jsonl", "never", rows=0)
    answers(root / "ladder" / "receipts" / "receipts-qzoom-64+64-gate-0.jsonl", "auto")
    answers(root / "ladder" / "calibration" / "scenes-plain-64.jsonl", "never", "scenes")
    answers(root / "ladder" / "report" / "scenes-plain-64.jsonl", "never", "scenes")
    answers(root / "baselines" / "receipts-always-64+64.jsonl", "always")
    (root / "ladder" / "times").mkdir()
    (root / "ladder" / "times" / "scenes-64.jsonl").write_text('{"plain": 64}\n', encoding="utf-8")
    answers(tmp_path / "runs" / "89ef89ef" / "ladder" / "report" / "scenes-plain-100.jsonl", "never", "scenes")  # newer
    names = [path.name for path in answer_files(tmp_path / "runs", WEIGHTS)]
    assert names == ["scenes-plain-64.jsonl", "receipts-plain-64.jsonl", "receipts-always-64+64.jsonl"]
    text = written(tmp_path)
    assert "## The ladder\n\ntable" in text
    assert "benchmarks.ladder`" not in text
    assert "benchmarks.ablations`" in text
    assert "(results/report/report.md)" in text
    assert "(results/report/1-receipts.png)" in text
    assert "(results/engine.md)" in text
    assert f"Drawn of the answers of the weights `{WEIGHTS}`.\n" in text
    assert "their seconds are no comparison" in text
    name_weights(results, "7777777777777777")
    assert answer_files(tmp_path / "runs", "7777777777777777") == []
    assert f"Drawn of the answers of an earlier run; {TABLES}" in written(tmp_path)
    name_weights(results, WEIGHTS)
    assert (results / "report" / "2-scenes.png").is_file()
    assert written(tmp_path) == text


def test_tables_of_an_earlier_embedded_model_are_named(tmp_path):
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    today = weights_digest(QZoom.from_pretrained().engine)
    (results / "ladder.md").write_text(f"## The ladder\n\nModel `tiny` (weights `{today}`, cpu).\n", encoding="utf-8")
    assert "earlier embedded model" not in written(tmp_path)
    (results / "r2i.md").write_text("## R2I\n\nBase `tiny` (weights `0123abcd`), student.\n", encoding="utf-8")
    assert f"The package has the weights `{today}`. Tables that name other weights are of" in written(tmp_path)


def test_answers_of_an_evaluation(tmp_path):
    answers(tmp_path / "runs" / "one.jsonl", "never")
    assert answer_files(tmp_path / "runs", WEIGHTS) == [tmp_path / "runs"]
    text = written(tmp_path)
    assert "(results/report/1-receipts.png)" in text
    assert "Drawn of the answers under `runs`.\n" in text


def test_charts_stay_where_their_answers_are_elsewhere(tmp_path):
    name_weights(tmp_path / "docs" / "results", WEIGHTS)
    file = tmp_path / "runs" / "0123abcd" / "ladder" / "report" / "scenes-plain-64.jsonl"
    answers(file, "never", "scenes")
    text = written(tmp_path)
    file.unlink()
    (tmp_path / "docs/results/report/2-of-an-older-report.png").write_bytes(b"")
    assert "(results/report/report.md)" in text
    said = f"Drawn of the answers of the weights `{WEIGHTS}`.\n"
    assert said in text
    older = written(tmp_path)
    assert older == text.replace(said, f"Drawn of the answers of an earlier run; {TABLES}\n")
