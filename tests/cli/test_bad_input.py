import io
import os

import pytest

QUESTION = "What is the total amount?"


def write(path, data):
    path.write_bytes(data)
    return path


PICTURES = {
    "no file": (lambda at, page: at / "missing.png", "missing.png"),
    "folder": (lambda at, page: at, "folder"),
    "not a picture": (lambda at, page: write(at / "notes.txt", b"just some words\n"), "JPEG, PNG, WebP"),
    "truncated": (lambda at, page: write(at / "cut.png", page.read_bytes()[:700]), "cut"),
    "address": (lambda at, page: "https://example.invalid/a.png", "host cannot be found"),
}


@pytest.mark.parametrize("verb", ["ask", "perceive"])
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(here, picture, tmp_path, verb, kind):
    make, part = PICTURES[kind]
    here(verb, make(tmp_path, picture), QUESTION, "--json").refuses(1, part)


@pytest.mark.parametrize(("data", "part"), [(b"", "0 bytes"), (b"no picture at all", "JPEG, PNG, WebP")])
def test_standard_input(here, monkeypatch, data, part):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    here("ask", "-", QUESTION).refuses(1, part)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file(here, tmp_path, picture):
    locked = write(tmp_path / "locked.png", picture.read_bytes())
    locked.chmod(0)
    here("ask", locked, QUESTION).refuses(1, "locked.png")


@pytest.mark.parametrize("verb", ["ask", "perceive"])
def test_questions_that_are_none(here, picture, verb):
    here(verb, picture, " \t").refuses(2, "question is empty")
    question = b"What is \xff?".decode("utf-8", "surrogateescape")
    here(verb, picture, question).refuses(1, "Character 9 of the user message (U+DCFF)")


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


def test_very_long_question(here, picture):
    here("ask", picture, "What is it? " * 8334, "--max-new-tokens", "2").refuses(2, "shorten the question")


@pytest.mark.parametrize(
    ("command", "value", "part"), [("ask", "-3", "neither MAX nor MIN:MAX"), ("perceive", "0", "0 is too small")]
)
def test_budgets_that_are_none(here, picture, command, value, part):
    result = here(command, picture, QUESTION, f"--coarse-tokens={value}")
    result.refuses(2, "--coarse-tokens", part)
    assert "min_tokens" not in result.err


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
        (("--temperature", "1", "--seed", "18446744073709551616"), 2, "seed must be a whole number"),
        (("--region-tokens", "90000000:99999999"), 2, "at least 90000000 visual tokens"),
        (("--max-new-tokens", "4090"), 2, "reads at most 4096; shorten the question, or lower --max-new-tokens"),
        (("--device", "toaster"), 2, "toaster"),
    ],
)
def test_options_that_lead_nowhere(here, picture, tmp_path, words, code, part):
    here("ask", picture, QUESTION, *(tmp_path if word == HERE else word for word in words)).refuses(code, part)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/out.png", "is not a directory"), ("folder.png", "it is a folder"), ("", "it is a folder"),
        ("out.svg", "use one of these endings: .bmp"), ("out", "use one of these endings"),
    ],
)  # fmt: skip
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
    here("convert", tmp_path / "nothing", tmp_path / "out").refuses(1)


@pytest.mark.slow
def test_without_docstrings_the_sentence_says_so(apart, picture):
    apart("ask", picture, QUESTION, env={"PYTHONOPTIMIZE": "2"}).refuses(1, "does not run without docstrings")
