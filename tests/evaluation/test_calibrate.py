import dataclasses
import json
import math
import re

import pytest

from qzoom.checkpoints.format import read_adapter_config
from qzoom.cli.main import run as command
from qzoom.config import TokenBudget, ZoomConfig
from qzoom.data.questions import read_calibration_questions
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.evaluation.calibrate import (
    CalibrationGoal,
    PairedAnswers,
    calibrate,
    choose,
    confidence_threshold,
    pair_answers,
    sweep,
)
from qzoom.evaluation.methods.confidence import calibrated_threshold
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.model import QZoom
from qzoom.scoring.intervals import binomial_cdf, questions_needed, upper_bound
from qzoom.types import GateDecision
from tests.evaluation.samples import model, row
from tests.tiny_models import engine, picture


def sample(score, *, harmed=False, gained=False, zooms=True, coarse_s=0.1, zoomed_s=0.3):
    return PairedAnswers(score, zooms, harmed, gained, coarse_s, zoomed_s)


def planted(n, harmed_from):
    """Scores 1/(2n), 3/(2n), ...; every question from this score on loses its answer unless it zooms."""
    scores = [(2 * i + 1) / (2 * n) for i in range(n)]
    return [sample(score, harmed=score >= harmed_from) for score in scores]


def test_binomials_bounds_and_counts_by_hand():
    assert binomial_cdf(0, 3, 0.5) == pytest.approx(1 / 8)
    assert binomial_cdf(1, 3, 0.5) == pytest.approx(4 / 8)
    assert binomial_cdf(2, 5, 0.2) == pytest.approx(sum(math.comb(5, k) * 0.2**k * 0.8 ** (5 - k) for k in range(3)))
    assert binomial_cdf(3, 3, 0.9) == 1
    assert binomial_cdf(-1, 3, 0.9) == 0
    assert upper_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(5, 5, 0.95) == 1
    for failures, n in ((1, 20), (7, 50), (3, 1000)):
        bound = upper_bound(failures, n, 0.95)
        assert binomial_cdf(failures, n, bound) == pytest.approx(0.05, rel=1e-6)
        assert bound > failures / n
    assert questions_needed(0.01, 0.95) == 299
    assert questions_needed(0.5, 0.5) == 1
    n = questions_needed(0.02, 0.9)
    assert upper_bound(0, n, 0.9) <= 0.02 < upper_bound(0, n - 1, 0.9)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        questions_needed(0.0, 0.95)


def test_sweep_by_hand():
    samples = [
        sample(0.8, harmed=True, coarse_s=0.2, zoomed_s=0.4),
        sample(0.2, gained=True),
        sample(0.6, zooms=False, coarse_s=0.1, zoomed_s=0.1),
        sample(0.6),
    ]
    points = sweep(samples)
    assert [p.threshold for p in points] == pytest.approx([0.0, 0.4, 0.7, 0.9])
    assert [p.share_zoomed for p in points] == [0.75, 0.5, 0.25, 0.0]
    assert [p.harmed for p in points] == [0, 0, 0, 0.25]
    assert [p.loss for p in points] == [0, -0.25, -0.25, 0]
    assert [p.latency_ms for p in points] == pytest.approx([275, 225, 175, 125])
    points = sweep([sample(1.0), sample(0.25)])
    assert [(p.threshold, p.share_zoomed) for p in points] == [(0.0, 1.0), (0.625, 0.5)]


def test_the_share_wished_for():
    samples = planted(100, 2)
    found = choose(samples, CalibrationGoal(share_zoomed=0.3))
    assert (found.share_zoomed, found.threshold) == (0.3, pytest.approx(0.7))
    assert sum(s.score >= found.threshold for s in samples) == 30
    assert found.interval == pytest.approx((0.2189, 0.3958), abs=2e-4)
    assert choose(samples, CalibrationGoal(share_zoomed=0.0)).share_zoomed == 0
    assert choose(samples, CalibrationGoal(share_zoomed=1.0)).threshold == 0
    tied = [sample(0.5) for _ in range(10)]
    assert choose(tied, CalibrationGoal(share_zoomed=0.3)).share_zoomed == 0


def test_the_latency_wished_for():
    samples = planted(100, 2)  # 100 ms coarse, 300 ms zoomed
    found = choose(samples, CalibrationGoal(latency_ms=150))
    assert (found.share_zoomed, found.latency_ms) == (0.25, pytest.approx(150))
    assert found.threshold == pytest.approx(0.75)
    low, high = found.interval
    half = 1.959964 * math.sqrt((25 * 150**2 + 75 * 50**2) / 99) / 10
    assert (low, high) == pytest.approx((150 - half, 150 + half), rel=1e-6)
    assert choose(samples, CalibrationGoal(latency_ms=300)).threshold == 0
    with pytest.raises(DataError, match=r"the fastest takes 100\.0 ms"):
        choose(samples, CalibrationGoal(latency_ms=99))


def test_the_loss_wished_for_finds_the_planted_threshold():
    """1000 questions, those above 0.4 need the zoom: the bound of 1 % allows k lost ones, no more."""
    samples = planted(1000, 0.4)
    allowed = max(k for k in range(20) if upper_bound(k, 1000, 0.95) <= 0.01)
    assert allowed == 4
    found = choose(samples, CalibrationGoal(max_accuracy_loss=0.01))
    assert (found.harmed, found.threshold) == (pytest.approx(allowed / 1000), pytest.approx(0.404))
    assert found.interval == (0.0, pytest.approx(upper_bound(4, 1000, 0.95)))
    strict = choose(samples, CalibrationGoal(max_accuracy_loss=0.01, confidence=0.99))
    assert strict.harmed < found.harmed
    assert choose(samples, CalibrationGoal(max_accuracy_loss=0.01), candidates=5).harmed < found.harmed
    assert choose(planted(1000, 2), CalibrationGoal(max_accuracy_loss=0.01)).share_zoomed == 0
    assert choose(planted(1000, 0), CalibrationGoal(max_accuracy_loss=0.01)).share_zoomed == pytest.approx(0.996)
    samples = [sample(0.1, gained=True) for _ in range(500)] + planted(1000, 0.4)
    assert choose(samples, CalibrationGoal(max_accuracy_loss=0.01)).threshold < 0.42


def test_the_bound_holds_as_often_as_it_says():
    """Where the true harm just exceeds the limit at a threshold, that threshold is passed in at most 10 % of draws."""
    import random

    drawn = random.Random(0)
    passed = 0
    for _ in range(80):
        samples = []
        for _ in range(200):
            score = drawn.random()
            samples.append(sample(score, harmed=drawn.random() < score))
        found = choose(samples, CalibrationGoal(max_accuracy_loss=0.1, confidence=0.9))
        passed += found.threshold**2 / 2 > 0.1  # the true harm below a threshold t is the integral of the score, t*t/2
    assert passed <= 80 * 0.1 + 3 * math.sqrt(80 * 0.1 * 0.9)


def test_too_few_questions_are_refused():
    with pytest.raises(DataError, match=r"57 questions are too few.*at least 299"):
        choose(planted(57, 2), CalibrationGoal(max_accuracy_loss=0.01))
    with pytest.raises(DataError, match=r"with 3 region thresholds to choose from takes at least 408"):
        choose(planted(299, 2), CalibrationGoal(max_accuracy_loss=0.01), candidates=3)
    assert choose(planted(299, 2), CalibrationGoal(max_accuracy_loss=0.01)).share_zoomed == 0
    with pytest.raises(DataError, match="not one question"):
        sweep([])
    with pytest.raises(DataError, match="outside"):
        sweep([sample(1.5)])


@pytest.mark.parametrize(
    "wish",
    [
        {}, {"share_zoomed": 0.3, "latency_ms": 10}, {"share_zoomed": 1.2}, {"latency_ms": 0}, {"latency_ms": math.nan},
        {"max_accuracy_loss": 0}, {"max_accuracy_loss": 0.1, "confidence": 1.0},
    ],
)  # fmt: skip
def test_wishes_that_make_no_sense(wish):
    with pytest.raises(ConfigError):
        CalibrationGoal(**wish)


OPTIONS = EvalOptions(coarse_tokens=TokenBudget(4, 12), region_tokens=TokenBudget(4, 9), max_new_tokens=3)


def write(folder, answers=None, pictures=4, each=3):
    """A question file with `pictures` pictures, and one answer to all or none."""
    lines = []
    for i in range(pictures):
        picture(i, 200 + 10 * i, 140).save(folder / f"{i}.png")
        for j in range(each):
            line = {"id": f"{i}-{j}", "image": f"{i}.png", "question": f"What is number {j}?"}
            lines.append(json.dumps(line | ({} if answers is None else {"answer": answers})))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_share_is_reached_and_noted(tmp_path):
    asked = model(region_threshold=0.4)
    questions = read_calibration_questions(write(tmp_path))
    found = calibrate(
        asked, questions, CalibrationGoal(share_zoomed=0.5), OPTIONS, keep=tmp_path / "kept", date="2026-01-02"
    )
    config = found.applied(asked.config)
    zoomed = 0
    for sample in questions:
        for question in sample.questions:
            said = asked.ask(
                sample.image, question.question, gate_threshold=config.gate_threshold,
                coarse_tokens=OPTIONS.coarse_tokens, region_tokens=OPTIONS.region_tokens, max_new_tokens=3,
            )  # fmt: skip
            zoomed += said.gate.zoomed
    assert zoomed == round(found.point.share_zoomed * 12) == 6
    facts = config.provenance["calibration"]
    assert facts["questions_sha256"] == questions.identity["sha256"]
    assert facts["wish"] == {"share_zoomed": 0.5, "confidence": 0.95}
    assert facts["reached"]["share_zoomed"] == 0.5
    assert (facts["date"], facts["labelled"], facts["region_thresholds"]) == ("2026-01-02", False, [0.4])
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"never.jsonl", "zoom-0.4.jsonl"}
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    again = calibrate(asked, questions, CalibrationGoal(share_zoomed=0.0), OPTIONS, keep=tmp_path / "kept")
    assert again.point.share_zoomed == 0
    assert "date" not in again.provenance
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}


def test_confidence_gates_zoom_as_often_as_the_gate(tmp_path):
    """Calibrated on a file, each gate reads as many of its questions as was noted, and the nearest to the gate's."""
    asked = model(region_threshold=0.4)
    questions = read_calibration_questions(write(tmp_path))
    wish = CalibrationGoal(share_zoomed=0.5)
    found = calibrate(asked, questions, wish, OPTIONS, keep=tmp_path / "kept", confidence_gates=True)
    config = found.applied(asked.config)
    calibrated = QZoom(dataclasses.replace(asked.engine, config=config))
    noted = config.provenance["calibration"]["confidence_gates"]
    assert set(noted) == {"margin", "entropy"}
    for name, gate in noted.items():
        options = EvalOptions("auto", OPTIONS.coarse_tokens, OPTIONS.region_tokens, max_new_tokens=3, method=name)
        rows = run(calibrated, questions, options)
        assert {row.gate.threshold for row in rows} == {gate["threshold"]}
        assert sum(row.zoomed for row in rows) == round(gate["share_zoomed"] * 12) == 6
        assert (tmp_path / "kept" / f"{name}.jsonl").exists()
        own = run(asked, questions, options)
        assert {row.gate.threshold for row in own} == {0.5}
        asked_for = run(calibrated, questions, dataclasses.replace(options, gate_threshold=0.9))
        assert {row.gate.threshold for row in asked_for} == {0.9}
    assert "confidence_gates" not in calibrate(asked, questions, wish, OPTIONS, keep=tmp_path / "kept").provenance


def test_a_share_that_ties_forbid_is_met_as_nearly_as_they_allow():
    def scored(score):
        return dataclasses.replace(row(), gate=GateDecision(score, 1.0, False))

    zoomed = [row(zoom=((0, 0, 9, 9),))] * 3 + [row()]
    rows = [scored(0.2), scored(0.8), scored(0.8), scored(0.9)]
    assert confidence_threshold(rows, zoomed, 0.2) == {"threshold": pytest.approx(0.85), "share_zoomed": 0.0}
    assert confidence_threshold(rows, zoomed, 0.4) == {"threshold": 0.5, "share_zoomed": 0.5}
    with pytest.raises(DataError, match="not one question"):
        confidence_threshold([row(error="no")], [row()], 0.5)


@pytest.mark.parametrize("value", [True, "0.5", 1.5, None])
def test_a_threshold_that_is_none_is_refused(value):
    provenance = {"calibration": {"confidence_gates": {"margin": {"threshold": value}}}}
    with pytest.raises(ConfigError, match="no number from 0 to 1"):
        calibrated_threshold(ZoomConfig(provenance=provenance), "margin")
    assert calibrated_threshold(ZoomConfig(provenance=provenance), "entropy") is None
    assert calibrated_threshold(ZoomConfig(provenance={"calibration": "none"}), "margin") is None


def test_labels_decide_what_is_harmed(tmp_path):
    """Answers that are what the model says zoomed: not zooming harms exactly where the coarse answer differs."""
    asked = model(region_threshold=0.4)
    path = write(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    options = {"coarse_tokens": OPTIONS.coarse_tokens, "region_tokens": OPTIONS.region_tokens, "max_new_tokens": 3}
    differ = 0
    for line in lines:
        said = [
            asked.ask(tmp_path / line["image"], line["question"], zoom=z, **options).text for z in ("always", "never")
        ]
        line["answer"] = ["something else", said[0] or "?"]
        differ += said[0] != said[1]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    questions = read_calibration_questions(path)
    found = calibrate(asked, questions, CalibrationGoal(max_accuracy_loss=0.5, confidence=0.5), OPTIONS)
    assert (found.always, found.asked) == (1.0, 12)
    assert found.point.harmed <= differ / 12
    assert differ > 0
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = calibrate(asked, questions, CalibrationGoal(share_zoomed=0.5), OPTIONS)
    assert found.failed > 0
    assert found.always == 1.0  # failed questions are left out of it too


def test_region_thresholds_are_compared_by_their_answers(tmp_path):
    asked = model(region_threshold=0.4)
    path = write(tmp_path, "no such answer", pictures=2)
    goal, thresholds = CalibrationGoal(share_zoomed=1.0), (0.4, 0.99)
    found = calibrate(asked, read_calibration_questions(path), goal, OPTIONS, region_thresholds=thresholds)
    assert (found.region_threshold, found.always) == (0.4, 0.0)  # a tie keeps the nearest to the checkpoint's own
    bare = read_calibration_questions(write(tmp_path, None, pictures=2))
    with pytest.raises(ConfigError, match="questions with answers"):
        calibrate(asked, bare, goal, OPTIONS, region_thresholds=thresholds)


def test_damaged_pictures_are_left_out_and_counted(tmp_path):
    path = write(tmp_path, pictures=3, each=2)
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = calibrate(model(), read_calibration_questions(path), CalibrationGoal(share_zoomed=0.5), OPTIONS)
    assert (found.asked, found.failed) == (4, 2)


def test_questions_that_do_not_fit_are_refused(tmp_path):
    from tests.evaluation.samples import row

    questions = read_calibration_questions(write(tmp_path, "33.90", pictures=1, each=1))
    coarse, zoomed = row("1", picture="0.png"), row("RM 33.90", picture="0.png", zoom=((0, 0, 9, 9),))
    samples, left_out = pair_answers([coarse], [zoomed], questions)
    assert left_out == 0
    assert (samples[0].score, samples[0].harmed, samples[0].gained, samples[0].zooms) == (0.75, True, False, True)
    assert pair_answers([coarse], [row(error="no", picture="0.png")], questions) == ([], 1)
    path = write(tmp_path, "x", pictures=1)
    text = path.read_text(encoding="utf-8").splitlines()
    bare = {key: value for key, value in json.loads(text[1]).items() if key != "answer"}
    path.write_text("\n".join([text[0], json.dumps(bare)]), encoding="utf-8")
    with pytest.raises(DataError, match="'0-0' has an answer and '0-1' has none"):
        read_calibration_questions(path)


def test_models_without_heads_are_refused(tmp_path):
    with pytest.raises(HeadsMissingError, match="thresholds"):
        calibrate(
            model(heads=False),
            read_calibration_questions(write(tmp_path, pictures=1)),
            CalibrationGoal(share_zoomed=0.5),
        )


def test_the_command_writes_a_model_that_zooms_as_wished(tmp_path, capsys):
    source = tmp_path / "random"
    QZoom(engine("qwen3_vl", region_threshold=0.4), "random").save_pretrained(source, include_base=True)
    words = ["calibrate", str(write(tmp_path)), "--share-zoomed", "0.25", "-o", str(tmp_path / "out")]
    more = ["--model", str(source), "--coarse-tokens", "12", "--region-tokens", "9", "--max-new-tokens", "3"]
    assert command([*words, *more, "--json", "--date", "today", "--device", "cpu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    zoom = read_adapter_config(tmp_path / "out").zoom
    assert zoom.gate_threshold == shown["gate_threshold"]
    assert zoom.provenance["calibration"]["date"] == "today"
    assert shown["reached"]["share_zoomed"] == 0.25
    loaded = QZoom.from_pretrained(tmp_path / "out")
    assert loaded.config.gate_threshold == zoom.gate_threshold
    assert command([*words, *more, "--confidence-gates", "--device", "cpu"]) == 0  # people read this one
    out, err = capsys.readouterr()
    assert re.search(r"warning: calibrated on \d+ questions; so few say nothing about the method", err)
    assert out.count(" zooms ") == 2
    assert "zoomed            25.0%" in out
    assert "interval" in out


def test_the_command_refuses_what_the_questions_cannot_show(tmp_path, capsys):
    path = str(write(tmp_path, "x", pictures=1))
    out = str(tmp_path / "out")
    assert command(["calibrate", path, "-o", out]) == 2
    assert "exactly one wish" in capsys.readouterr().err
    source = tmp_path / "random"
    QZoom(engine("qwen3_vl"), "random").save_pretrained(source, include_base=True)
    words = ["--max-accuracy-loss", "0.01", "--model", str(source), "--max-new-tokens", "2", "--device", "cpu"]
    keep = tmp_path / "keep"
    assert command(["calibrate", path, "-o", out, *words, "--keep", str(keep)]) == 1
    assert "3 questions are too few" in capsys.readouterr().err
    assert not keep.exists()  # nothing was asked
    assert not (tmp_path / "out").exists()
    assert command(["calibrate", path, "-o", out, "--share-zoomed", "0.5", "--region-thresholds", "a,b"]) == 2


def test_a_coarse_answer_takes_as_long_as_what_decides_and_the_answer(tmp_path):
    questions = read_calibration_questions(write(tmp_path, "33.90", pictures=1, each=1))
    times = {"gate": 40.0, "region": 300.0, "coarse_answer": 900.0}
    coarse = dataclasses.replace(row("1", picture="0.png"), seconds=2.0)
    zoomed = dataclasses.replace(row("RM 33.90", picture="0.png", zoom=((0, 0, 9, 9),)), timing_ms=times)
    taken = {by: pair_answers([coarse], [zoomed], questions, by)[0][0].coarse_s for by in ("gate", "map", "answer")}
    assert taken == pytest.approx({"gate": 2.04, "map": 2.3, "answer": 2.0})
