"""What cannot work is said in one sentence, with exit code 1 and nothing on standard output."""

import json
import os
import struct
import zlib

import pytest
from PIL import Image

QUESTION = "What is the total amount?"


def png_bomb(width, height):
    """A PNG that promises far more pixels than its few bytes hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write(path, data):
    path.write_bytes(data)
    return path


def sized(path, size):
    Image.new("RGB", size, "white").save(path)
    return path


def truncated(path, picture):
    return write(path, picture.read_bytes()[:700])


PICTURES = {
    "no file": (lambda at, page: at / "missing.png", "missing.png"),
    "folder": (lambda at, page: at, "folder"),
    "not a picture": (lambda at, page: write(at / "notes.txt", b"just some words\n"), "JPEG, PNG, WebP"),
    "truncated": (lambda at, page: truncated(at / "cut.png", page), "cut"),
    "empty": (lambda at, page: write(at / "empty.jpg", b""), "0 bytes"),
    "one pixel": (lambda at, page: sized(at / "dot.png", (1, 1)), "1 x 1 px"),
    "strip": (lambda at, page: sized(at / "strip.png", (1, 60000)), "1 x 60000 px"),
    "long strip": (lambda at, page: sized(at / "long.png", (2, 60000)), "200 times"),
    "bomb": (lambda at, page: write(at / "bomb.png", png_bomb(30000, 30000)), "30000 x 30000 px"),
    "address": (lambda at, page: "https://example.invalid/a.png", "host cannot be found"),
}


@pytest.mark.parametrize("verb", ["ask", "perceive"])
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(here, picture, tmp_path, verb, kind):
    make, part = PICTURES[kind]
    here(verb, make(tmp_path, picture), QUESTION, "--json").refuses(1, part)


@pytest.mark.parametrize(("data", "part"), [(b"", "0 bytes"), (b"no picture at all", "JPEG, PNG, WebP")])
def test_standard_input(apart, data, part):
    apart("ask", "-", QUESTION, stdin=data).refuses(1, part)


def test_second_picture_of_two(here, picture, tmp_path):
    here("ask", picture, tmp_path / "gone.png", QUESTION).refuses(1, "gone.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file(here, tmp_path, picture):
    locked = write(tmp_path / "locked.png", picture.read_bytes())
    locked.chmod(0)
    here("ask", locked, QUESTION).refuses(1, "locked.png")


@pytest.mark.parametrize("question", ["", "   ", "\n\t"])
def test_empty_question(here, picture, question):
    here("ask", picture, question).refuses(2, "question is empty")


@pytest.mark.parametrize("verb", ["ask", "perceive"])
def test_bytes_that_are_no_text(apart, picture, verb):
    question = b"What is \xff?".decode("utf-8", "surrogateescape")
    apart(verb, picture, question).refuses(1, "Character 9 of the user message (U+DCFF)")


def test_a_picture_is_neither_question_nor_target(here, picture, tmp_path):
    before = picture.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    for target in (picture, link):
        here("ask", picture, QUESTION, "--save", target).refuses(
            2, "--save", "is the picture itself; name another file"
        )
    assert picture.read_bytes() == before
    for words in ((picture, picture), (QUESTION, link)):
        here("ask", *words).refuses(2, "the question comes last", "is a file; add a question after it.")


@pytest.mark.parametrize("seed", ["1" + "0" * 30, "-9223372036854775809", "18446744073709551616"])
def test_seed_out_of_range(here, picture, seed):
    here("ask", picture, QUESTION, "--temperature", "1", "--seed", seed).refuses(2, "seed must be a whole number")


def test_very_long_question(here, picture):
    here("ask", picture, "What is it? " * 8334, "--max-new-tokens", "2").refuses(2, "shorten the question")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>"])
def test_special_tokens_are_text(here, picture, token):
    plain = here("ask", picture, "What is the total?", "--json", "--quiet", "--max-new-tokens", "2")
    result = here("ask", picture, f"What is the total? {token}", "--json", "--quiet", "--max-new-tokens", "2")
    assert (plain.code, result.code, result.err) == (0, 0, "")
    assert usage(result)["coarse_tokens"] == usage(plain)["coarse_tokens"]
    assert usage(result)["prompt_tokens"] - usage(result)["region_tokens"] > (
        usage(plain)["prompt_tokens"] - usage(plain)["region_tokens"] + 3
    )


def usage(result):
    import json

    return json.loads(result.out)["usage"]


@pytest.mark.parametrize("command", ["ask", "perceive"])
@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("0", "0 is too small; the least is 1"),
        ("0:5", "0 is too small"),
        ("9:4", "the minimum 9 is above the maximum 4"),
        ("-3", "neither MAX nor MIN:MAX"),
        ("1e3", "neither MAX nor MIN:MAX"),
    ],
)
def test_budgets_that_are_none(here, picture, command, value, part):
    result = here(command, picture, QUESTION, f"--coarse-tokens={value}")
    result.refuses(2, "--coarse-tokens", part)
    assert "min_tokens" not in result.err


@pytest.mark.parametrize(
    ("verb", "flag"), [("ask", "--coarse-tokens"), ("ask", "--region-tokens"), ("perceive", "--coarse-tokens")]
)
def test_absurd_budget(here, picture, verb, flag):
    here(verb, picture, QUESTION, flag, "90000000:99999999").refuses(2, "at least 90000000 visual tokens")


def test_no_network(apart, picture):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    apart("ask", picture, QUESTION, "--model", "some-owner/some-model", env=nowhere).refuses(1, "some-owner/some-model")


HERE = "the test's folder"


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("--model", "no-such-owner/no-such-model"), 1, "no-such-owner/no-such-model"),
        (("--model", "not a model id"), 1, "not a model id"),
        (("--model", "./no/such/folder"), 1, "no/such/folder"),
        (("--model", HERE), 1, "neither config.json nor qzoom_config.json"),
        (("--model", HERE, "--revision", "v1"), 1, "has no revisions"),
        (("--model", "tiny", "--revision", "v1"), 1, "has no revisions"),
        (("--preset", "nonsense"), 2, "No preset 'nonsense'"),
        (("--zoom", "sometimes"), 2, "'--zoom': 'sometimes' is not one of 'auto', 'never', 'always'"),
        (("--gate-threshold", "nan"), 2, "'--gate-threshold': it must be a number of at most 1"),
        (("--gate-threshold", "30%"), 2, "'--gate-threshold': it must be a number"),
        (("--seed", "x"), 2, "'--seed': it must be a whole number"),
        (("--max-new-tokens", "4090"), 2, "reads at most 4096; shorten the question, or lower --max-new-tokens"),
        (("--device", "toaster"), 2, "toaster"),
    ],
)
def test_options_that_lead_nowhere(here, picture, tmp_path, words, code, part):
    here("ask", picture, QUESTION, *(tmp_path if word == HERE else word for word in words)).refuses(code, part)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/out.png", "is not a directory"),
        ("folder.png", "it is a folder"),
        ("", "it is a folder"),
        ("out.svg", "use one of these endings: .bmp"),
        ("out", "use one of these endings"),
    ],
)
def test_a_figure_that_cannot_be_saved_is_refused_before_anything_is_loaded(here, picture, tmp_path, place, said):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    result = here("ask", picture, QUESTION, "--save", tmp_path / place, "--json", "--model", "no/such-model")
    result.refuses(2, "--save")
    assert said in result.err


def test_an_answer_is_printed_before_its_figure_fails(here, picture, tmp_path):
    answer = here("ask", picture, QUESTION, "--quiet").out
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    result = here("ask", picture, QUESTION, "--save", full, "--quiet")
    assert (result.code, result.out) == (1, answer)
    assert "Cannot save the figure" in result.err
    assert len(result.err.splitlines()) == 1


def test_arguments_are_utf8_under_every_locale(apart, picture, tmp_path):
    page = tmp_path / "größe.png"
    page.write_bytes(picture.read_bytes())
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = ("ask", page, "Größe? 値段", "--quiet", "--json", "--zoom", "never")
    expected, result = json.loads(apart(*words).out), apart(*words, env=plain)
    assert result.code == 0, result.err
    assert {**json.loads(result.out), "timing_ms": {}} == {**expected, "timing_ms": {}}


def test_without_docstrings_the_sentence_says_so(apart, picture):
    apart("ask", picture, QUESTION, env={"PYTHONOPTIMIZE": "2"}).refuses(1, "does not run without docstrings")


def test_convert_from_nowhere(here, tmp_path):
    here("convert", tmp_path / "nothing", tmp_path / "out").refuses(1)
