import json
import pickle

import numpy as np
from PIL import Image

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


def test_published_labels_whose_image_is_missing_are_code_1_and_are_converted_later(here, tmp_path):
    maps = {name: np.eye(6, dtype=np.float32) for name in ("sink_attn", "grounding_attn_o2i")}
    pickled = tmp_path / "stage1.pkl"
    pickled.write_bytes(pickle.dumps([{"image": "a.png", "prompt": "What is it?", "text": "a cat"} | maps]))
    words = ("convert", "labels", pickled, "--output", tmp_path / "labels")
    some = here(*words)
    assert some.code == 1
    assert "1 entries not converted, since their image cannot be read; the first: entry 0: The picture" in some.err
    assert "Run the same command again" in some.err
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    whole = here(*words)
    assert whole.code == 0
    assert "label maps of 1 entries" in whole.err
    assert "not converted" not in whole.err
