import base64
import io
import json

import pytest

from qzoom.config import TokenBudget
from qzoom.data.benchmarks.registry import BENCHMARKS, open_task
from qzoom.data.benchmarks.table import picture_source
from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.evaluation.score import row_score, score
from tests.evaluation.samples import model
from tests.tiny_models import picture

WORD = "\nAnswer the question using a single word or phrase."


def png(seed=0, width=120, height=80):
    file = io.BytesIO()
    picture(seed, width, height).save(file, "PNG")
    return file.getvalue()


def coded(seed=0):
    return base64.b64encode(png(seed)).decode()


ROWS = {
    "textvqa": {"question": "what Brand is It?", "answers": ["Nike"] * 7 + ["puma"] * 3},
    "docvqa": {"question": "What is the Date?", "answers": ["1 May", "May 1"]},
    "infovqa": {"question": "How many?", "answers": ["12"]},
    "chartqa": {"question": "Which year?", "answer": "1999", "type": "human_test"},
    "ocrbench": {
        "question": " what is written? ",
        "answer": ["CENTRE"],
        "dataset": "IIIT5K",
        "question_type": "Regular Text Recognition",
    },
    "vstar": {
        "text": "What is the colour of the cup? (A) red (B) light blue\n(C) black (D) white",
        "label": "B",
        "category": "direct_attributes",
    },
    "mme_realworld_lite": {
        "question": "How many cars?",
        "multi-choice options": ["(A) 1", "(B) 2", "(C) 3", "(D) 4", "(E) none is right"],
        "answer": "C",
        "category": "Perception/Monitoring",
    },
    "hrbench4k": {"question": "What is it?", "A": "a cup", "B": "7", "C": None, "answer": "b", "category": "single"},
    "hrbench8k": {"question": "What is it?", "A": "a cup", "B": "a hat", "answer": "A", "category": "cross"},
    "zoombench": {
        "query": "What colour is the lid?\nA. red\nB. blue\nAnswer with the letter.",
        "response": "B",
        "question_type": "mcq",
        "bbox": [3, 4, 50.2, 60],
    },
}
ASKED = {
    "textvqa": ("What brand is it?" + WORD, "Nike", "textvqa", "vqa_accuracy"),
    "docvqa": ("What is the Date?" + WORD, "1 May", "docvqa", "anls"),
    "infovqa": ("How many?" + WORD, "12", "infovqa", "anls"),
    "chartqa": ("Which year?\nAnswer the question with a single word.", "1999", "human", "relaxed_accuracy"),
    "ocrbench": ("what is written?", "CENTRE", "Regular Text Recognition", "contains"),
    "vstar": (
        "What is the colour of the cup?\nA. red\nB. light blue\nC. black\nD. white\n"
        "Answer with the option's letter from the given choices directly.",
        "B",
        "direct_attributes",
        "choice_vstar",
    ),
    "mme_realworld_lite": (
        "How many cars? The choices are listed below:\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) none is right\n"
        "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
        "(A, B, C, D, or E) of the correct option.\nThe best answer is: ",
        "C",
        "perception",
        "choice_mme",
    ),
    "hrbench4k": ("What is it?\nA. a cup\nB. 7\nAnswer the option letter directly.", "B", "single", "choice_hrbench"),
    "hrbench8k": (
        "What is it?\nA. a cup\nB. a hat\nAnswer the option letter directly.",
        "A",
        "cross",
        "choice_hrbench",
    ),
    "zoombench": (
        "What colour is the lid?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
        "B",
        "mcq",
        "choice_zoombench",
    ),
}


def write_lines(folder, name, rows, split=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split or BENCHMARKS[name].split}.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return folder


def with_picture(name, value, **changes):
    return ROWS[name] | {BENCHMARKS[name].picture: value} | changes


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_are_those_of_the_harness(tmp_path, name):
    task = open_task(name, data=write_lines(tmp_path, name, [with_picture(name, coded())]))
    sample = task.sample(0)
    (asked,) = sample.questions
    assert (sample.error, sample.size_px) == (None, (120, 80))
    assert (asked.question, asked.answer, asked.field, asked.metric) == ASKED[name]
    assert (task.ids, task.identity["task"]) == ((f"{name}-0",), name)


def test_choices_answers_and_formulas_are_kept(tmp_path):
    def asked(name):
        return open_task(name, data=write_lines(tmp_path / name, name, [with_picture(name, coded())])).sample(0)

    assert asked("vstar").questions[0].choices == ("red", "light blue", "black", "white")
    assert asked("mme_realworld_lite").questions[0].choices == ("1", "2", "3", "4", "none is right")
    assert asked("hrbench4k").questions[0].choices == ("a cup", "7")
    assert asked("textvqa").questions[0].answers == ("Nike",) * 7 + ("puma",) * 3
    row = with_picture("ocrbench", coded(), dataset="HME100k", answer="x^2")
    (asked,) = open_task("ocrbench", data=write_lines(tmp_path, "ocrbench", [row])).sample(0).questions
    assert (asked.metric, asked.answers) == ("contains_formula", ("x^2",))


@pytest.mark.parametrize("inside", [True, False])
def test_base64_without_a_slash_is_no_name_of_a_file(tmp_path, inside):
    data = bytes(range(24)) * 10  # 320 characters of base64, more than a file's name may have, and none of them "/"
    text = base64.b64encode(data).decode()
    assert "/" not in text
    assert picture_source(text, "image", tmp_path if inside else None) == data


def test_pictures_as_paths_base64_and_data_urls(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(png(1))
    values = [
        "images/one.png", coded(1), f"data:image/png;base64,{coded(1)}", {"bytes": None, "path": "images/one.png"},
    ]  # fmt: skip
    task = open_task("infovqa", data=write_lines(tmp_path, "infovqa", [with_picture("infovqa", v) for v in values]))
    samples = [task.sample(i) for i in range(4)]
    assert [s.error for s in samples] == [None] * 4
    assert len({s.image.tobytes() for s in samples}) == 1


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Tables as the datasets library writes them, its cache in a folder of the test."""
    datasets = pytest.importorskip("datasets", reason="the extra eval is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def table(rows, feature=True):
        made = datasets.Dataset.from_list(rows)
        return made.cast_column("image", datasets.Image()) if feature else made

    return table


@pytest.mark.parametrize("where", ["validation.parquet", "data/validation-00000-of-00001.parquet"])
def test_parquet(tmp_path, parquet, where):
    rows = [with_picture("docvqa", {"bytes": png(i, 100 + i, 60), "path": None}) for i in range(3)]
    file = tmp_path / "bench" / "docvqa" / where
    file.parent.mkdir(parents=True)
    parquet(rows).to_parquet(file)
    task = open_task("docvqa", data=tmp_path / "bench")
    assert [task.sample(i).size_px for i in range(3)] == [(100, 60), (101, 60), (102, 60)]
    assert task.sample(2).questions[0].answers == ("1 May", "May 1")
    assert len(task.identity["sha256"]) == 64


def test_saved_to_disk_with_one_damaged_picture(tmp_path, parquet):
    rows = [with_picture("infovqa", {"bytes": data, "path": None}) for data in (png(), b"no picture", png(1))]
    parquet(rows, feature=False).save_to_disk(tmp_path / "saved" / "validation")
    task = open_task("infovqa", data=tmp_path / "saved")
    assert [task.sample(i).error is None for i in range(3)] == [True, False, True]
    assert task.sample(1).error.startswith("Row 1: ")
    assert task.sample(1).questions[0].answer == "12"


IN_LISTS = {
    "mapping": ([{"bytes": png(), "path": None}], None),
    "bytes": ([png()], None),
    "base64": ([coded()], None),
    "several": ([{"bytes": png(), "path": None}] * 2, "holds a list of 2 pictures: expected exactly one"),
    "several bytes": ([png(), png()], "holds a list of 2 pictures: expected exactly one"),
    "none": ([], "holds a list of 0 pictures"),
    "mapping without a picture": ([{"bytes": None, "path": None}], "holds no picture"),
}


@pytest.mark.parametrize("feature", [False, True])
@pytest.mark.parametrize("kind", IN_LISTS)
def test_lists_of_pictures(tmp_path, parquet, kind, feature):
    import datasets

    cell, reason = IN_LISTS[kind]
    if feature and kind != "mapping" and kind != "several":
        pytest.skip("a column of pictures holds mappings")
    table = parquet([with_picture("infovqa", cell)], feature=False)
    if feature:
        table = table.cast_column("image", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "validation.parquet")
    sample = open_task("infovqa", data=tmp_path).sample(0)
    if reason is None:
        assert (sample.error, sample.size_px) == (None, (120, 80))
    else:
        assert reason in sample.error
        assert "x89" not in sample.error
        assert len(sample.error) < 150


BAD = {
    "bytes as question": (with_picture("infovqa", coded(), question=[1, 2]), "'question' must hold a text, not a list"),
    "not json": ("{oops", "is not JSON"),
    "no object": ("[1]", "is no object"),
    "no question": ({"image": coded(), "answers": ["1"]}, "'question' is missing"),
    "empty question": (with_picture("infovqa", coded(), question=" "), "'question' is empty"),
    "question as number": (with_picture("infovqa", coded(), question=3), "'question' must hold a text"),
    "answers as number": (with_picture("infovqa", coded(), answers=12), "'answers' must hold a list of texts"),
    "no answers": (with_picture("infovqa", coded(), answers=[]), "'answers' must hold a list of texts"),
    "no picture": (ROWS["infovqa"], "'image' is missing"),
    "null picture": (with_picture("infovqa", None), "holds no picture"),
    "list of pictures": (with_picture("infovqa", [coded(), coded(1)]), "holds a list of 2 pictures"),
    "picture elsewhere": (with_picture("infovqa", "../secret.png"), "inside the data folder"),
    "absolute picture": (with_picture("infovqa", "/etc/hostname"), "inside the data folder"),
    "missing picture": (with_picture("infovqa", "gone.png"), "is not in"),
    "no base64": (with_picture("infovqa", "no picture at all"), "neither the path of a picture nor base64"),
    "damaged picture": (with_picture("infovqa", base64.b64encode(b"hello world").decode()), "Row 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_a_wrong_answer_with_a_reason(tmp_path, kind):
    row, said = BAD[kind]
    task = open_task("infovqa", data=write_lines(tmp_path, "infovqa", [with_picture("infovqa", coded()), row]))
    sample = task.sample(1)
    assert said in sample.error
    assert sample.error.startswith("Row 1: ")
    options = EvalOptions("never", TokenBudget(4, 12), max_new_tokens=2)
    rows = run(model(), task, options)
    assert [r.error is None for r in rows] == [True, False]
    assert row_score(rows[1]) == 0.0
    found = score(rows, task.fields)
    assert (found.n, found.errors) == (2, 1)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("vstar", {"label": "E"}, "must name one of the 4 options"),
        ("mme_realworld_lite", {"answer": "F"}, "must name one of the 5 options"),
        ("hrbench4k", {"answer": "C"}, "must name one of the 2 options"),
        ("hrbench4k", {"A": None}, "without a gap"),
    ],
)
def test_right_options_exist(tmp_path, name, change, said):
    task = open_task(name, data=write_lines(tmp_path, name, [with_picture(name, coded(), **change)]))
    assert said in task.sample(0).error


def test_missing_tables(tmp_path):
    with pytest.raises(DataError, match=r"no table of chartqa with the split 'test'"):
        open_task("chartqa", data=tmp_path)
    with pytest.raises(ConfigError, match="local folder"):
        open_task("chartqa", data=tmp_path, revision="main")
    (tmp_path / "test.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows"):
        open_task("chartqa", data=tmp_path)


def test_a_hub_that_is_not_there_is_one_sentence(parquet, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"'echo840/OCRBench' could not be opened .*--data"):
        open_task("ocrbench", revision="main")


def test_splits_and_identity(tmp_path):
    write_lines(tmp_path, "chartqa", [with_picture("chartqa", coded())])
    write_lines(tmp_path, "chartqa", [with_picture("chartqa", coded(1), type="augmented_test")] * 2, split="val")
    test, val = open_task("chartqa", data=tmp_path), open_task("chartqa", data=tmp_path, split="val")
    assert (len(test.ids), len(val.ids)) == (1, 2)
    assert val.sample(0).questions[0].field == "augmented"
    assert test.identity["sha256"] != val.identity["sha256"]
    assert test.max_new_tokens == 16
