import io
import json

import pytest

from qzoom.data.benchmarks.registry import open_task
from qzoom.data.benchmarks.zoombench import LETTER_PROMPT, SHORT_PROMPT, ZOOMBENCH, options_in, without_instruction
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.evaluation.score import score
from qzoom.evaluation.zoom_views import GapSettings, region_task
from qzoom.evaluation.zoomgap import ask_views
from tests.evaluation.samples import model
from tests.tiny_models import picture

OPTIONS = "What colour is the lid?\nA. red\nB. light blue\nC. none of these"
ROW = {"query": OPTIONS, "response": "B", "question_type": "mcq", "bbox": [10.5, 20, 29.2, 30]}


def png(seed, width=120, height=80):
    file = io.BytesIO()
    picture(seed, width, height).save(file, "PNG")
    return file.getvalue()


def parquet(folder, rows):
    datasets = pytest.importorskip("datasets")
    features = {
        "image": datasets.Image(),
        "crop_image": datasets.Image(),
        "bbox": datasets.Sequence(datasets.Value("float32")),
    }
    texts = {name: datasets.Value("string") for name in ("id", "query", "response", "question_type")}
    given = [
        {"id": str(i), "image": {"bytes": png(i)}, "crop_image": {"bytes": png(i + 9, 38, 20)}} | row
        for i, row in enumerate(rows)
    ]
    table = datasets.Dataset.from_list(given, features=datasets.Features(features | texts))
    table.to_parquet(str(folder / "test.parquet"))
    return folder


def test_prompts_answers_and_options():
    plain = ZOOMBENCH.question(ROW)
    assert plain.question == f"{OPTIONS}\n{LETTER_PROMPT}"
    for asked in ("Answer with the letter.", "Please answer directly with the option's letter", LETTER_PROMPT):
        assert ZOOMBENCH.question(ROW | {"query": f"{OPTIONS}\n{asked}"}) == plain
    assert ZOOMBENCH.question(ROW | {"query": f"<image>\n{OPTIONS} Answer with the option letter only."}) == plain
    assert plain.choices == ("red", "light blue", "none of these")
    assert (plain.field, plain.answer, plain.metric) == ("mcq", "B", "choice_zoombench")
    assert plain.boxes == ((10, 20, 30, 30),)
    other = {"prompt": OPTIONS, "answer": "(B)", "bbox": "[10.5, 20, 29.2, 30]"}
    assert ZOOMBENCH.question(other) == ZOOMBENCH.question(ROW)
    asked = ZOOMBENCH.question({"query": "How many cups?", "response": " 3 ", "question_type": "blank", "bbox": None})
    assert (asked.question, asked.answer, asked.boxes) == (f"How many cups?\n{SHORT_PROMPT}", "3", ())
    assert (asked.field, asked.metric) == ("blank", "blank_zoombench")
    assert ZOOMBENCH.question({"query": "How many cups?", "response": "3"}).field == "blank"
    assert options_in("Which? (A) red (B) light blue\n(C) green") == ("red", "light blue", "green")
    assert options_in("Which?\nA) 1\nB) 2") == ("1", "2")
    assert options_in("Which?\nB. 1\nC. 2") == ()
    assert options_in("Which letter is on the door?") == ()
    assert without_instruction("Which letter is on the door?") == "Which letter is on the door?"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": None}, "'query' must hold a text"),
        ({"response": "F"}, "names none of the 3 options"),
        ({"question_type": "essay"}, "mcq or blank"),
        ({"bbox": [1, 2, 3]}, "four numbers"),
        ({"bbox": [5, 5, 5, 9]}, "left, top, right, bottom"),
        ({"bbox": [0, 0, float("nan"), 9]}, "left, top, right, bottom"),
    ],
)
def test_unusable_rows_count_as_wrong(tmp_path, changes, said):
    picture(0, 60, 40).save(tmp_path / "one.png")
    row = {"image": "one.png"} | ROW | changes
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    sample = open_task("zoombench", data=tmp_path).sample(0)
    assert said in sample.error


def test_a_local_parquet(tmp_path):
    blank = {"query": "How many?", "response": "3", "question_type": "blank", "bbox": [0, 0, 60, 80]}
    task = open_task("zoombench", data=parquet(tmp_path, [ROW, blank]))
    reader = model(heads=False)
    rows = run(reader, task, EvalOptions("never", max_new_tokens=2))
    found = score(rows, task.fields)
    assert list(found.strict) == ["mcq", "blank", "all"]
    assert {name: group["n"] for name, group in found.areas.items()} == {"1-3%": 1, ">=10%": 1}
    assert found.to_dict()["areas"].keys() == {"1-3%", ">=10%"}
    settings = GapSettings(("full", "region"), 24, "shipped", 0.0, 1, max_new_tokens=2)
    kept, _ = ask_views(reader, task, settings)
    assert [row.size_px for row in kept["region"]] == [(38, 20), (38, 20)]
    own = region_task(
        task, "region", (("zoombench-0", 0, 0),), GapSettings(crop_scale=2.0, crop_margin=0.0, crop_min_px=1), 32
    )
    assert own.sample(0).size_px == (40, 20)
