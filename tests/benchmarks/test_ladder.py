import json
from pathlib import Path

import pytest

from benchmarks.evidence import Clock, Line, Look, OutOfTimeError
from benchmarks.ladder import main
from benchmarks.ladder_figures import task_figures, words, write_ladder
from benchmarks.ladder_time import BATCHED, TimeWork, questions_of, read_times, summary
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.data.benchmarks.registry import open_task
from qzoom.errors import ConfigError, HeadsMissingError
from qzoom.evaluation.report_figures import Run
from tests.evaluation.samples import receipt, row, write_split
from tests.tiny_models import engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pretrained(engine("qwen3_vl"), tmp_path_factory.mktemp("model") / "model", include_base=True)


@pytest.fixture
def words_of(model, tmp_path):
    data = write_split(tmp_path / "data", [receipt("a"), receipt("b", 90, 260), receipt("c"), receipt("d")])
    given = ["--model", model, "--data", data, "--kinds", "receipts", "--device", "cpu", "--max-new-tokens", 2]
    given += ["--caps", 12, 24, "--coarse", 6, 9, "--region", 6, 12]
    given += ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    return [str(word) for word in given]


def kept(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "runs").rglob("*.jsonl")}


@pytest.mark.slow
def test_receipts_from_the_first_question_to_the_times(words_of, tmp_path):
    assert main([*words_of, "--minutes", "0.0000001"]) == 3
    first = kept(tmp_path)
    assert len(first) == 1
    assert next(iter(first.values())).count(b"\n") == 2  # the header and the questions about one picture
    assert main(words_of) == 0
    done = kept(tmp_path)
    assert {name: data[: len(first[name])] for name, data in done.items() if name in first} == first
    # plain at 6 and 9 for the gate and at 12 and 24, and four splits
    assert len(done) == 8
    figures = json.loads((tmp_path / "results" / "ladder.json").read_text(encoding="utf-8"))
    found = figures["kinds"]["receipts"]
    assert found["finished"]
    assert (found["questions"], found["pictures"]) == (12, 4)
    assert [line["cap"] for line in found["plain"]] == [12, 24]
    assert [line["cap"] for line in found["zoom"]] == [12, 24]
    assert all(line["tokens"] <= line["cap"] for line in [*found["plain"], *found["zoom"]])
    assert found["peaks"]["questions"] == 12
    assert "Not finished" not in (tmp_path / "results" / "ladder.md").read_text(encoding="utf-8")
    words_of += ["--time", "--time-questions", "3", "--time-batch", "2"]
    assert main(words_of) == 0
    timed = json.loads((tmp_path / "results" / "ladder.json").read_text(encoding="utf-8"))["kinds"]["receipts"]["times"]
    assert {name: (one["questions"], one["batch"]) for name, one in timed.items()} == {
        "12": (1, 1), "24": (1, 1), "equal-accuracy": (3, 1), "equal-accuracy-batched": (3, 2),
        "equal-accuracy-shared": (3, 2),
    }  # fmt: skip
    after = kept(tmp_path)
    assert main(words_of) == 0
    assert kept(tmp_path) == after


@pytest.mark.slow
def test_drawn_pictures_choose_on_other_pictures(model, tmp_path, capsys):
    given = [
        "--model", model, "--kinds", "scenes", "--max-new-tokens", 1, "--device", "cpu", "--limit", 1, "--caps", 12,
        "--coarse", 6,
    ]  # fmt: skip
    given += ["--region", 6, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    given = [str(word) for word in given]
    assert main([*given, "--dry-run"]) == 0
    assert "1 calibration | scenes" in capsys.readouterr().out
    assert kept(tmp_path) == {}
    assert main(given) == 0
    names = {path.parent.name + "/" + path.name for path in (tmp_path / "runs").rglob("*.jsonl")}
    assert {"calibration/scenes-plain-6.jsonl", "calibration/scenes-qzoom-6+6-gate-0.jsonl"} <= names
    assert "report/scenes-plain-12.jsonl" in names
    pictures = [
        {json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()[1:]}
        for path in (tmp_path / "runs").rglob("scenes-*.jsonl")
    ]
    assert {"scenes-500000"} in pictures
    assert {"scenes-0"} in pictures
    assert "no evidence" in (tmp_path / "results" / "ladder.md").read_text(encoding="utf-8")


def test_kinds_whose_answers_are_elsewhere_keep_their_figures_of_the_same_weights(tmp_path):
    page = ROOT / "docs" / "results" / "ladder.json"
    known = json.loads(page.read_text(encoding="utf-8"))
    scenes = {"scenes": known["kinds"]["scenes"]}
    (tmp_path / "ladder.json").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert list(write_ladder(tmp_path, scenes, known["about"], None)["kinds"]) == ["scenes", "documents", "receipts"]
    sections = (tmp_path / "ladder.md").read_text(encoding="utf-8").split("### ")[1:]
    assert ["Figures of an earlier run" in section for section in sections] == [False, True, True]
    assert list(write_ladder(tmp_path, scenes, known["about"] | {"weights": "others"}, None)["kinds"]) == ["scenes"]
    (tmp_path / "ladder.json").write_text("{", encoding="utf-8")
    assert list(write_ladder(tmp_path, scenes, known["about"], None)["kinds"]) == ["scenes"]


def test_what_cannot_be_run(tmp_path):
    with pytest.raises(ConfigError, match="--data"):
        main(["--kinds", "receipts"])
    with pytest.raises(ConfigError, match="--limit must be above 0"):
        main(["--limit", "0"])
    with pytest.raises(ConfigError, match="--time-batch must be above 0"):
        main(["--kinds", "scenes", "--time-batch", "0"])
    plain = save_pretrained(engine("qwen3_vl", heads=False), tmp_path / "plain", include_base=True)
    with pytest.raises(HeadsMissingError, match="no region branch"):
        main(["--model", str(plain), "--kinds", "scenes", "--device", "cpu", "--runs", str(tmp_path / "runs")])


def test_times_and_the_questions_that_are_timed():
    rows = [row(picture=name, index=i) for name in "ba" for i in range(2)]
    assert questions_of(rows, 3) == (("b", 0), ("b", 1), ("a", 0))
    assert questions_of(rows, 1) == (("b", 0),)
    assert questions_of(rows, 3, together=False) == (("b", 0), ("a", 0), ("b", 1))
    lines = [
        {"picture": name, "index": 0, "load": 0.5, "plain": {"s": 1.0, "decode_s": 0.25}, "zoom": {"s": 0.5}}
        for name in "ab"
    ]
    found = summary(lines)
    assert (found["ratio"], found["interval"], found["bound"], found["questions"]) == (2.0, [2.0, 2.0], 4.0, 2)
    assert (found["batch"], found["plain_s"]) == (1, 1.0)
    found = summary([{**line, "questions": 4} for line in lines])
    assert (found["ratio"], found["questions"], found["batch"], found["plain_s"]) == (2.0, 8, 4, 0.25)
    zoom = {"a": Look(64, 100, 0.9), "b": Look(64, 100, 0.9), "c": Look(32, 64, 0.5)}
    asked = (("a", 0), ("a", 1), ("c", 0), ("b", 0), ("c", 1))
    work = TimeWork(BATCHED, None, Look(576), zoom, asked, None, batch=2)
    assert work.groups() == [(("a", 0), ("a", 1)), (("b", 0),), (("c", 0), ("c", 1))]
    Clock().check()
    with pytest.raises(OutOfTimeError):
        Clock(0).check()


def test_intervals_draw_pictures_not_questions():
    rows = tuple(row("33.90" if name in "ab" else "1", picture=name, index=i) for name in "abcd" for i in range(10))
    lines = {64: Line(rows, Run(Path(), {}, {}, rows), dict.fromkeys("abcd", Look(64)))}
    found = task_figures(open_task("scenes", seed=0, count=4), lines, lines, [64])
    assert (found["plain"][0]["accuracy"], found["plain"][0]["interval"]) == (0.5, [0.0, 1.0])
    assert found["zoom"][0]["interval"] == [0.0, 1.0]
    assert (found["match"]["difference"], found["match"]["interval"], found["times"]) == (0.0, [0.0, 0.0], {})


def timed_work(path, cap, **values):
    zoom = {"a": Look(32, 32, 0.5), "b": Look(32, 32, 0.5)}
    return TimeWork("64", None, Look(cap), zoom, (("a", 0), ("b", 0)), path, **values)


def test_times_of_another_pair_are_neither_shown_nor_lost(tmp_path):
    path = tmp_path / "times" / "scenes-64.jsonl"
    work = timed_work(path, 64)
    assert (read_times([work], "w"), work.begin("w")) == ({}, [])
    taken = {"picture": "a", "index": 0, "load": 0.5, "plain": {"s": 1.0, "decode_s": 0.25}, "zoom": {"s": 0.5}}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(taken) + "\n" + '{"picture": "b", "ind')
    assert read_times([work], "w")["64"]["ratio"] == 2.0
    assert work.begin("w") == [taken]
    assert path.read_text(encoding="utf-8").endswith(json.dumps(taken) + "\n")
    whole = path.read_bytes()
    for other, weights in ((timed_work(path, 96), "w"), (timed_work(path, 64, longest=8), "w"), (work, "x")):
        assert read_times([other], weights) == {}
    assert path.read_bytes() == whole
    assert timed_work(path, 96).begin("w") == []
    assert read_times([work], "w") == {}
    assert (tmp_path / "times" / "scenes-64.jsonl.1").read_bytes() == whole
    assert work.begin("w") == []
    assert [p.name for p in sorted(path.parent.iterdir())] == [path.name, f"{path.name}.1", f"{path.name}.2"]


def line(cap, accuracy, **values):
    shared = {"tokens": float(cap), "gflops": cap / 10, "interval": [accuracy - 0.01, accuracy + 0.01]}
    return shared | {"cap": cap, "looks": f"≤ {cap // 2} + {cap // 2}", "gate": "0.3", "accuracy": accuracy} | values


def test_the_words():
    zoom = [
        line(64, 0.4, zoomed=0.5, hit=None, against_plain={"difference": 0.2, "interval": [0.1, 0.3]}),
        line(128, 0.6, zoomed=1.0, hit=0.7, against_plain={"difference": -0.3, "interval": [-0.4, -0.2]}),
    ]
    match = {"cap": 64, "looks": "≤ 32 + 32", "gate": "0.3", "difference": 0.01, "interval": [-0.01, 0.02]}
    timed = {"ratio": 0.8, "interval": [0.7, 0.9], "questions": 9, "bound": 3.0, "plain_s": 0.3, "plain_decode_s": 0.1}
    found = {
        "questions": 20, "pictures": 2, "finished": False, "plain": [line(64, 0.2), line(128, 0.995)], "zoom": zoom,
        "plain_peak": 128, "full_size": 0.9, "bound": 12.0,
        "times": {
            "64": timed, "equal-accuracy-batched": timed | {"ratio": 6.0, "batch": 8},
            "equal-accuracy-shared": timed | {"batch": 4},
        },
        "match": match | {"tokens_saved": 0.5, "gflops_ratio": 2.5},
    }  # fmt: skip
    text = "\n".join(words("scenes", found))
    for part in (
        "Not finished",
        "| 64 | 20.0 | 64 | 6.4 | ≤ 32 + 32 | 0.3 | 40.0 | 64 | 6.4 | 50.0 | – | +20.0 | +10.0 to +30.0 |",
        "a throughput that was not timed",
        "50.0 % fewer visual tokens and 2.50 times fewer operations. The goal was 4.39 times and 73.0 %.",
        "better at 64; worse at 128 tokens",
        "64: 0.80; so slower at 64.",
        "Zooming and the plain model of the same cap were not timed at 128 tokens.",
        "of 8 questions about different pictures, the same pair is at 6.00 times the throughput (0.70 to 0.90, 9 ques",
        "of 4 questions about the same pictures, which are encoded once, the same pair is at 0.80 times",
        "shows 90.0 % of the pictures at full size",
        "reads everything",
        "1/12.0",
    ):
        assert part in text
    assert "No cap" not in text
    without = "\n".join(words("scenes", found | {"match": None, "full_size": 0.1, "plain": [line(64, 0.2)]}))
    assert "no cap at which zooming matches" in without
    alone = "\n".join(words("scenes", found | {"times": {}}))
    assert "In batches of questions about different pictures this pair was not timed." in alone
    assert "of the same cap were not timed at 64, 128 tokens." in alone
    assert "full size" not in without
