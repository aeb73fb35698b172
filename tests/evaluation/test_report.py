import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from qzoom.cli.main import run as command
from qzoom.config import TokenBudget
from qzoom.data.benchmarks.registry import open_task
from qzoom.errors import DataError
from qzoom.evaluation.report import failure_kind, failures, findings, write_report
from qzoom.evaluation.report_figures import group_runs, measure, read_run, read_runs
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.evaluation.tables import log_ticks
from qzoom.scoring.intervals import bootstrap
from qzoom.store.log import LogWriter
from qzoom.types import GateDecision, Region, Usage
from tests.evaluation.samples import model, receipt, row, write_split

PLACE = (10, 10, 30, 20)
QUESTIONS = {"task": "documents", "seed": 0}
SHAPE = {
    "layers": 6, "hidden": 192, "query": 192, "key": 96, "feed": 512, "vocabulary": 608, "shared_layers": 3,
    "branch_layers": 2, "vision_layers": 4, "vision_hidden": 160, "vision_feed": 480, "vision_gated": False,
    "vision_full_layers": 4, "window_patches": 0, "patch_values": 1536, "merge": 2, "mergers": 2,
}  # fmt: skip


def write(
    path,
    right,
    *,
    zoom="never",
    method="qzoom",
    caps=(144, 144),
    seconds=0.1,
    questions=QUESTIONS,
    prefix="a",
    more=None,
):
    """An answer file of pictures with two questions each; `right` says which answers are right."""
    limits = [{"min_tokens": 4, "max_tokens": cap} for cap in caps]
    options = {"zoom": zoom, "method": method, "coarse_tokens": limits[0], "region_tokens": limits[1]} | (more or {})
    file = LogWriter(
        path, "answers", {"questions": questions, "options": options}, about={"model": "m", "shape": SHAPE}
    )
    zoomed = zoom != "never"
    for i in range(0, len(right), 2):
        rows = []
        for j in (0, 1):
            made = row("33.90" if right[i + j] else "wrong <b>", seconds=seconds, boxes=(PLACE,))
            read = (Region((0, 0, 40, 40), 0.5, 0, (64, 64), caps[1]),) if zoomed else ()
            changes = {
                "picture": f"{prefix}-{i // 2}", "index": j, "count": 2, "question": f"What is {j}?",
                "gate": GateDecision(0.7 if zoom == "auto" else None, None, zoomed), "regions": read,
                "usage": Usage(caps[0], caps[1] if zoomed else 0, sum(caps) + 20, 4, 0),
            }  # fmt: skip
            rows.append(dataclasses.replace(made, **changes))
        file.append(f"{prefix}-{i // 2}", [made.to_dict() for made in rows])
    file.close()
    return path


@pytest.fixture
def runs(tmp_path):
    """Plain at 144 and 288, the gate at 72 + 72: 4, 6 and 7 of 10 right, at 0.1, 0.2 and 0.05 s."""
    folder = tmp_path / "runs"
    folder.mkdir()
    write(folder / "plain-144.jsonl", [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], caps=(144, 144), seconds=0.1)
    write(folder / "plain-288.jsonl", [1, 1, 1, 1, 1, 1, 0, 0, 0, 0], caps=(288, 144), seconds=0.2)
    write(folder / "qzoom-144.jsonl", [1, 1, 1, 1, 1, 1, 1, 0, 0, 0], zoom="auto", caps=(72, 72), seconds=0.05)
    return folder


def figures(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))["tasks"]


def test_the_figures_are_those_planted(runs, tmp_path):
    write_report([runs], tmp_path / "out")
    (task,) = figures(tmp_path / "out")
    assert (task["questions"], task["pictures"], task["dropped"]) == (10, 5, 0)
    lines = {line["label"]: line for line in task["runs"]}
    assert {name: line["accuracy"] for name, line in lines.items()} == {
        "plain, ≤ 144": 0.4,
        "plain, ≤ 288": 0.6,
        "qzoom, ≤ 72 + 72": 0.7,
    }
    best = lines["qzoom, ≤ 72 + 72"]
    assert (best["zoomed"], best["hit_rate"], best["visual_tokens"], best["seconds"]) == (1.0, 1.0, 144, 0.05)
    assert best["difference"] == pytest.approx(0.1)
    assert best["interval"][0] <= 0.7 <= best["interval"][1]
    assert best["difference_interval"][0] <= 0.1 <= best["difference_interval"][1]
    assert best["gflops"] > 0
    assert task["best_plain"] == "plain, ≤ 288"
    equal = task["equal_accuracy"]
    assert (equal["run"], equal["throughput"]) == ("qzoom, ≤ 72 + 72", pytest.approx(4.0))
    assert equal["tokens_saved"] == pytest.approx(0.5)
    (budget,) = task["equal_budget"]
    assert (budget["cap"], budget["plain"]) == (144, "plain, ≤ 144")
    assert (budget["difference"], budget["throughput"]) == (pytest.approx(0.3), pytest.approx(2.0))
    assert task["fronts"]["seconds"] == ["qzoom, ≤ 72 + 72"]
    assert task["fronts"]["visual_tokens"] == ["qzoom, ≤ 72 + 72"]


def test_a_zooming_run_that_is_worse_is_not_on_the_front(tmp_path):
    write(tmp_path / "a.jsonl", [1, 1, 0, 0], caps=(144, 144), seconds=0.1)
    write(tmp_path / "b.jsonl", [1, 0, 0, 0], zoom="auto", caps=(144, 144), seconds=0.3)
    (task,) = [measure(group) for group in group_runs(read_runs([tmp_path]))]
    assert (task.fronts["seconds"], task.equal_accuracy) == (("plain, ≤ 144",), None)
    write_report([tmp_path], tmp_path / "out")
    assert "no zooming run reaches the best plain run" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.7, 1.6, [0.7, 1.0, 1.5]),
        (60, 1100, [100.0, 300.0, 1000.0]),
        (0.01, 100, [0.01, 0.1, 1.0, 10.0, 100.0]),
        (130, 280, [150.0, 200.0]),
    ],
)
def test_axes_carry_round_numbers(low, high, ticks):
    found = log_ticks(low, high)
    assert set(ticks) <= set(found)
    assert 3 <= len(found) <= 7


def test_draws_are_of_pictures_paired_and_told_when_few(runs, tmp_path):
    assert "Only 5 pictures" in findings(measure(group_runs(read_runs([runs]))[0]))[-1]
    scores = np.array([[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]], dtype=float)
    pictures = ["a", "a", "b", "b", "c", "c", "d", "d"]
    drawn = bootstrap(scores, pictures, seed=0)
    assert drawn.shape == (3, 2000)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_allclose(drawn[0] + drawn[2], 1.0)
    assert set(np.unique(drawn[0])) == {0, 0.25, 0.5, 0.75, 1}  # four pictures, whole ones only
    assert drawn[0].std() == pytest.approx(0.25, abs=0.02)  # of four pictures with 0 or 1: sqrt(0.25 / 4)
    np.testing.assert_array_equal(bootstrap(scores, pictures, seed=0), drawn)
    assert (bootstrap(scores, pictures, seed=1) != drawn).any()


class _Page(HTMLParser):
    """Collects what a page would load, its texts and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.words, self.tags = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.loaded += [given[name] for name in ("src", "href", "xlink:href", "data", "srcset") if given.get(name)]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_stands_alone(runs, tmp_path):
    write_report([runs], tmp_path / "out", title="A & B <test>")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(place.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for place in page.loaded)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert "script" not in page.tags
    assert sum(place.startswith("data:image/png") for place in page.loaded) == 1
    assert page.tags.count("table") == 1
    assert "A & B <test>" in page.words
    assert "wrong <b>" in page.words
    assert "4.00×" in page.words


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    def digest(folder):
        write_report([runs], folder)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    first = digest(tmp_path / "one")
    assert first == digest(tmp_path / "two")
    assert set(first) == {"report.html", "report.md", "report.json", "1-documents.png"}
    with Image.open(tmp_path / "one" / "1-documents.png") as chart:
        assert chart.width > 1500
        assert len(chart.convert("RGB").resize((200, 60)).getcolors(12000)) > 20


def test_the_markdown_points_to_the_charts(runs, tmp_path):
    write_report([runs], tmp_path / "docs" / "results" / "report", page=tmp_path / "docs" / "results.md")
    text = (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")
    (chart,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / "docs" / chart).is_file()
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert {len(cells) for cells in table} == {11}
    assert table[4][0].strip() == "qzoom, ≤ 72 + 72"
    assert table[4][1].strip() == "70.0"
    assert table[4][3].strip() == "+10.0"


def test_only_pictures_that_all_runs_answered_count(tmp_path):
    write(tmp_path / "a.jsonl", [1, 1, 0, 0, 1, 1], caps=(144, 144))
    write(tmp_path / "b.jsonl", [0, 0, 1, 1], zoom="auto")
    write(tmp_path / "c.jsonl", [1, 1], questions={"task": "scenes", "seed": 0})
    documents, scenes = [measure(group) for group in group_runs(read_runs([tmp_path]))]
    assert (documents.name, documents.questions, documents.dropped) == ("documents", 4, 1)
    assert (scenes.name, scenes.questions) == ("scenes", 2)
    write(tmp_path / "d.jsonl", [1, 1], prefix="other")
    with pytest.raises(DataError, match="no picture in common"):
        group_runs(read_runs([tmp_path]))


def test_runs_with_the_same_name_are_told_apart(tmp_path):
    write(tmp_path / "first.jsonl", [1, 1])
    write(tmp_path / "second.jsonl", [0, 0])
    (group,) = group_runs(read_runs([tmp_path]))
    assert group.labels == ("plain, ≤ 144 (first)", "plain, ≤ 144 (second)")


def test_files_of_one_name_in_several_folders_have_names_of_their_own(tmp_path):
    names = []
    for folder in ("one/x", "two/x", "two/y"):
        write(tmp_path / folder / "receipts.jsonl", [1, 1] if folder == "two/y" else [1, 0])
        (group,) = group_runs(read_runs([tmp_path]))
        names.append(group.labels)
    assert names[1] == ("plain, ≤ 144 (one)", "plain, ≤ 144 (two)")
    assert names[2] == (
        "plain, ≤ 144 (one/x/receipts)",
        "plain, ≤ 144 (two/x/receipts)",
        "plain, ≤ 144 (two/y/receipts)",
    )
    assert measure(group).fronts["seconds"] == ("plain, ≤ 144 (two/y/receipts)",)


def test_equal_budgets_are_of_runs_asked_alike(tmp_path):
    for name, right, more in (
        ("a-hot", [0, 0, 0, 0], {"temperature": 1.0}),
        ("b-cold", [1, 0, 0, 0], {"temperature": 0.0}),
        ("c-warm", [1, 1, 1, 0], {"temperature": 0.5}),
    ):
        write(tmp_path / f"{name}.jsonl", right, more=more)
    write(tmp_path / "qzoom.jsonl", [1, 1, 0, 0], zoom="auto", caps=(72, 72), more={"temperature": 0.0})
    write(tmp_path / "other.jsonl", [1, 1, 1, 1], zoom="auto", caps=(72, 72), more={"temperature": 2.0})
    task = measure(group_runs(read_runs([tmp_path]))[0])
    assert {(item["run"], item["plain"]) for item in task.equal_budget} == {
        ("qzoom, ≤ 72 + 72 (qzoom)", "plain, ≤ 144 (b-cold)"),
        ("qzoom, ≤ 72 + 72 (other)", "plain, ≤ 144 (c-warm)"),  # none alike: the best
    }
    assert any("differ in temperature as well" in sentence for sentence in findings(task))


def test_a_run_with_more_tokens_says_more(tmp_path):
    write(tmp_path / "plain.jsonl", [1, 0, 0, 0], caps=(72, 72))
    write(tmp_path / "qzoom.jsonl", [1, 1, 0, 0], zoom="auto", caps=(72, 72))
    write_report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "with 100.0 % more visual tokens" in page
    assert "+100.0 %" in page
    assert "-100.0" not in page


def test_where_answers_went_wrong():
    held = row("x", zoom=((0, 0, 40, 40),), boxes=(PLACE,))
    assert failure_kind(held) == "misread"
    assert failure_kind(row("x", zoom=((50, 50, 90, 90),), boxes=(PLACE,))) == "beside"
    assert failure_kind(row("x", zoom=((50, 50, 90, 90),))) == "unknown"
    assert failure_kind(row("x", boxes=(PLACE,))) == "coarse"
    assert failure_kind(row(error="no")) == "failed"


def test_the_gallery_shows_the_pictures_of_a_real_run(tmp_path):
    """A random model on a held-out document: all wrong, so every kind is shown with its picture drawn anew."""
    task = open_task("documents", seed=3, count=1)
    options = EvalOptions("always", TokenBudget(4, 12), TokenBudget(4, 9), max_new_tokens=2, region_threshold=0.0)
    run(model(), task, options, output=tmp_path / "run.jsonl")
    (group,) = group_runs([read_run(tmp_path / "run.jsonl")])
    cards = failures(group, group.runs[0], 2)
    assert cards
    assert all(card.jpeg for card in cards)
    assert len({card.row.picture for card in cards}) == 1
    (task,) = write_report([tmp_path / "run.jsonl"], tmp_path / "out", failures_each=1)
    assert task.runs[0].gflops > 0
    assert "data:image/jpeg;base64," in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_pictures_of_a_question_file_are_found_in_its_folder(tmp_path):
    """The folder is named as `qzoom eval receipts --data` takes it: the file's own, or one of several tasks' data."""
    task = open_task("receipts", data=write_split(tmp_path / "par" / "receipts", [receipt("a")]))
    options = EvalOptions("never", TokenBudget(4, 12), max_new_tokens=2)
    file, out = tmp_path / "run.jsonl", tmp_path / "out"
    run(model(), task, options, output=file)
    for data in (tmp_path / "par", tmp_path / "par" / "receipts"):
        write_report([file], out, data=data)
        assert "data:image/jpeg;base64," in (out / "report.html").read_text(encoding="utf-8")
    write_split(tmp_path / "other", [receipt("b")])
    for data in (tmp_path / "other", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=rf"{data.name} does not hold the questions of these answers \(dev.jsonl\)"):
            write_report([file], tmp_path / "none", data=data)
    assert not (tmp_path / "none").exists()


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "made"
    assert command(["report", str(runs), "-o", str(out), "--page", str(tmp_path / "results.md")]) == 0
    said = capsys.readouterr()
    assert "documents: 3 runs, 10 questions" in said.out
    assert "at 4.00 times its throughput" in said.out
    assert (out / "report.html").is_file()
    assert "made/1-documents.png" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    with pytest.raises(DataError, match="not about a question file; leave --data out"):
        write_report([runs], tmp_path / "out", data=tmp_path)
    assert command(["report", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    (runs / "other.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.jsonl does not start like a file of answers"):
        write_report([runs], tmp_path / "out")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (runs / "other.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be written"):
        write_report([runs], tmp_path / "file")
