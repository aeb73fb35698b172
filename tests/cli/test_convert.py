import json

QUESTION = "What is the total amount?"
SHORT = ("--json", "--quiet", "--max-new-tokens", "6", "--zoom", "always", "--region-threshold", "0")


def answer(here, model, picture):
    result = here("ask", picture, QUESTION, "--model", model, *SHORT)
    assert result.code == 0, result.err
    values = json.loads(result.out)
    return values["tokens"], values["gate"], values["regions"]


def test_there_and_back_answers_the_same(here, checkpoint, picture, tmp_path):
    merged, again = tmp_path / "merged", tmp_path / "again"
    first = here("convert", checkpoint, merged)
    assert (first.code, first.out) == (0, "")
    assert f"saved   {merged}: adapter to upstream" in first.err
    assert here("convert", merged, again, "--quiet").err == ""
    expected = answer(here, checkpoint, picture)
    assert answer(here, merged, picture) == expected
    assert answer(here, again, picture) == expected


def test_answer_only_cannot_zoom_but_answers(here, checkpoint, picture, tmp_path):
    plain = tmp_path / "plain"
    assert here("convert", checkpoint, plain, "--answer-only").code == 0
    here("ask", picture, QUESTION, "--model", plain, "--zoom", "always").refuses(1, "no region branch")
    coarse = ("--zoom", "never", "--json", "--quiet", "--max-new-tokens", "6")
    told = [
        json.loads(here("ask", picture, QUESTION, "-m", model, *coarse).out)["tokens"] for model in (plain, checkpoint)
    ]
    assert told[0] == told[1]


def test_a_folder_with_other_things_is_not_touched(here, checkpoint, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    here("convert", checkpoint, tmp_path).refuses(1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
