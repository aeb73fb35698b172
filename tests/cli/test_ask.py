import json
import os
import pty
import re
import subprocess
import sys

import pytest
from PIL import Image

from qzoom.cli.console import printable
from tests.pdfs import of_pictures

QUESTION = "What is the total amount?"
KEYS = {"text", "gate", "regions", "usage", "timing_ms"}
USAGE = {"coarse_tokens", "region_tokens", "prompt_tokens", "completion_tokens", "reused_tokens"}


def record(result):
    """The JSON line of a result, after checking that it is the only one."""
    assert result.code == 0, result.err
    assert result.out.endswith("\n")
    assert result.out.count("\n") == 1
    return json.loads(result.out)


def test_json_line(here, picture):
    result = here("ask", picture, QUESTION, "--json", "--zoom", "always", "--region-threshold", "0")
    values = record(result)
    assert values.keys() >= KEYS
    assert values["gate"].keys() >= {"score", "threshold", "zoomed"}
    assert values["usage"].keys() >= USAGE
    assert values["gate"]["zoomed"] is True
    for region in values["regions"]:
        x0, y0, x1, y1 = region["box"]
        assert 0 <= x0 < x1 <= 420
        assert 0 <= y0 < y1 <= 640
        assert 0 <= region["score"] <= 1
    usage = values["usage"]
    assert usage["prompt_tokens"] > usage["coarse_tokens"] + usage["region_tokens"] > usage["coarse_tokens"] > 0
    assert 0 < usage["completion_tokens"] <= 128
    assert usage["reused_tokens"] == 0
    assert values["timing_ms"]["total"] > 0
    assert values["image_sizes_px"] == [[420, 640]]
    assert "gate" in result.err
    assert "cost" in result.err


def test_zoom_and_its_thresholds_are_obeyed(here, picture):
    values = record(here("ask", picture, QUESTION, "--json", "--zoom", "never", "--quiet"))
    assert (values["gate"]["zoomed"], values["regions"]) == (False, [])
    assert values["usage"]["region_tokens"] == 0
    eager = record(here("ask", picture, QUESTION, "--json", "--gate-threshold", "0", "--region-threshold", "0"))
    calm = record(here("ask", picture, QUESTION, "--json", "--gate-threshold", "1"))
    assert (eager["gate"]["zoomed"], calm["gate"]["zoomed"]) == (True, False)
    assert eager["gate"]["score"] == pytest.approx(calm["gate"]["score"], abs=1e-6)
    assert (eager["gate"]["threshold"], calm["gate"]["threshold"]) == (0, 1)
    limits = ["--coarse-tokens", "20:40", "--region-tokens", "16"]
    values = record(here("ask", picture, QUESTION, "--json", "--zoom", "always", "--region-threshold", "0", *limits))
    assert 20 <= values["usage"]["coarse_tokens"] <= 40
    assert 0 < values["usage"]["region_tokens"] <= 16


def test_text_alone_on_standard_output(here, picture):
    expected = record(here("ask", picture, QUESTION, "--json"))["text"]
    loud = here("ask", picture, QUESTION)
    assert loud.out == f"{expected}\n"
    assert re.search(r"^gate ", loud.err, re.MULTILINE)
    assert re.search(r"^cost +\d+ coarse \+ \d+ region visual tokens", loud.err, re.MULTILINE)
    quiet = here("ask", picture, QUESTION, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, f"{expected}\n", "")


def test_standard_input_is_a_picture_and_arguments_are_utf8_under_every_locale(apart, here, picture, tmp_path):
    page = tmp_path / "größe.png"
    Image.new("RGB", (300, 300), "grey").save(page)
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    more = ("Größe? 値段", "--quiet", "--json", "--zoom", "never")
    expected = record(here("ask", page, picture, *more))
    piped = apart("ask", page, "-", *more, stdin=picture.read_bytes(), env=plain)
    assert {**record(piped), "timing_ms": {}} == {**expected, "timing_ms": {}}
    assert piped.err == ""


def test_save_draws_the_answer(here, picture, tmp_path):
    target = tmp_path / "new folder" / "answer.png"
    result = here("ask", picture, QUESTION, "--save", target)
    assert result.code == 0
    assert str(target) in result.err
    with Image.open(target) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 200


def test_several_regions_and_the_box_rule(here, picture):
    perceive = ("perceive", picture, QUESTION, "--json", "--max-regions", 2, "--region-threshold")
    steps = (f"0.{tenths}" for tenths in range(9, 0, -1))
    threshold = next(step for step in steps if len(record(here(*perceive, step))["regions"]) == 2)
    look = ("--zoom", "always", "--read-once", "--region-threshold", threshold, "--max-new-tokens", "1")
    words = ("ask", picture, QUESTION, "--json", *look)
    own = record(here(*words))
    many = record(here(*words, "--max-regions", 3))
    best = record(here(*words, "--max-regions", 3, "--components", "peak_component", "--positions", "second_image"))
    assert (len(own["regions"]), len(best["regions"])) == (1, 1)
    assert 1 < len(many["regions"]) <= 3
    assert best["regions"][0]["box"] == own["regions"][0]["box"] == many["regions"][0]["box"]
    for flag, value in (("--max-regions", "0"), ("--max-regions", "65"), ("--components", "one"), ("--positions", "x")):
        here(*words, flag, value).refuses(2, flag)
    equal = record(here(*words, "--max-regions", 3, "--region-shares", "equal", "--region-tokens", 33))
    count = len(many["regions"])
    assert [region["box"] for region in equal["regions"]] == [region["box"] for region in many["regions"]]
    assert all(0 < region["tokens"] <= -(-33 // count) for region in equal["regions"])
    told = record(here("ask", picture, QUESTION, "--json", "--decide-by", "map", "--gate-threshold", "1", *look[5:]))
    assert 0 < told["gate"]["score"] < 1
    assert not told["gate"]["zoomed"]


def test_decoding_is_as_asked(here, picture):
    words = ["ask", picture, QUESTION, "--json", "--temperature", "2", "--max-new-tokens", "12", "--seed"]
    first, again, other = (record(here(*words, seed))["tokens"] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    values = record(here("ask", picture, QUESTION, "--json", "--max-new-tokens", "1"))
    assert values["usage"]["completion_tokens"] == len(values["tokens"]) == 1
    whole = record(here("ask", picture, QUESTION, "--json"))["text"]
    stop = whole[1:2]
    cut = record(here("ask", picture, QUESTION, "--json", "--stop", stop))
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_several_pictures_and_first_frames(here, picture, tmp_path):
    second = tmp_path / "second.png"
    Image.new("RGB", (300, 300), "grey").save(second)
    values = record(here("ask", picture, second, QUESTION, "--json"))
    assert values["image_sizes_px"] == [[420, 640], [300, 300]]
    frames = [Image.new("RGB", (200, 200), colour) for colour in ("white", "black", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    result = here("ask", tmp_path / "moving.gif", QUESTION, "--json")
    assert any("first of 3" in note for note in record(result)["notes"])
    assert "first of 3" in result.err


def test_a_question_may_begin_with_a_dash(here, picture):
    result = here("ask", "--quiet", "--max-new-tokens", "2", "--", picture, "- what is the total?")
    assert (result.code, result.err) == (0, "")


def test_terminal_shows_gate_then_text_then_cost(here, picture):
    expected = printable(here("ask", picture, QUESTION, "--quiet").out.rstrip("\n"))
    shown = in_a_terminal("ask", str(picture), QUESTION)
    waiting, shown = shown.split("\r\x1b[K")
    before, after = shown.split(f"\n{expected}\n")
    assert waiting.startswith("loading ")
    assert before.startswith("gate ")
    assert after.startswith("cost ")


def in_a_terminal(*words):
    """What a person would see."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qzoom", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, seen
    return seen.decode().replace("\r\n", "\n").lstrip("\n")


def test_model_by_environment(here, picture, monkeypatch):
    monkeypatch.setenv("QZOOM_MODEL", "./no/such/folder")
    result = here("ask", picture, QUESTION)
    assert result.code == 1
    assert "no/such/folder" in result.err


@pytest.fixture
def document(tmp_path, picture):
    """Three pages: the picture between two empty ones."""
    path = tmp_path / "pages.pdf"
    empty = Image.new("RGB", (420, 640), "white")
    path.write_bytes(of_pictures([empty, picture, empty], dpi=200))
    return path


def test_pdf(here, document, tmp_path):
    result = here("ask", document, QUESTION, "--json", "--zoom", "always", "--save", tmp_path / "look.png")
    values = record(result)
    assert values["image_sizes_px"] == [[420, 640]] * 3
    region, *again = values["regions"]
    assert region["page"] == 2
    assert all(part["reread"] and part["page"] == 2 for part in again)
    assert region["box_pt"] == [round(value * 72 / 200, 1) for value in region["box"]]
    assert f"page 2, {region['box']} px ({region['box_pt']} pt), score" in result.err
    assert "all 3 pages of the PDF as drawn at 200 dots per inch; text layers are not read" in result.err
    assert Image.open(tmp_path / "look.png").width == 1800
    here("ask", document, QUESTION, "--pages", "9").refuses(2, "there is no page 9; choose from 1 to 3.")
