import json
import shutil

import pytest
import yaml
from PIL import Image, ImageDraw

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.store.records import RecordStore, missing_samples
from tests.tiny_models import build_engine

SMALL = ("--device", "cpu", "--quiet", "--json")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model without branches, six pictures and a question file."""
    folder = tmp_path_factory.mktemp("stages")
    save_pretrained(build_engine("qwen3_vl", heads=False), folder / "base", include_base=True)
    lines = []
    for number in range(6):
        page = Image.new("RGB", (160, 120), "white")
        ImageDraw.Draw(page).text((20 + 15 * number, 15 * number), f"NO {number}", fill="black", font_size=20)
        page.save(folder / f"{number}.png")
        lines.append({"id": f"q{number}", "image": f"{number}.png", "question": "Which number?", "answer": str(number)})
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(path, **values):
    base = {"batch": 2, "micro_batch": 2, "steps": 2, "precision": "float32", "trackers": [], "tokens": [12]}
    path.write_text(yaml.safe_dump(base | values))
    return path


def label(here, place, *more):
    words = ("label", "regions", "--questions", place / "q.jsonl", "-m", place / "base", "--tokens", "20")
    settings = place / "labels.yaml"
    if "--recipe" not in more:
        settings.write_text("maps: {min_peak: 0.0, ignore_share: 1.0, foreground: 0.95}\n")
        more = (*more, "--recipe", settings)
    return here(*words, "--max-new-tokens", "4", "--heads", "2:1 4:3", *SMALL, *more)


@pytest.mark.timeout(1200)
def test_from_questions_to_an_adapter(here, place, tmp_path):
    made = label(here, place, "-o", tmp_path / "labels", "--foreground", "0.95")
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert (report["questions"], report["maps"], report["skipped"]) == (6, 6, 0)
    assert report["usable"] > 0
    again = json.loads(label(here, place, "-o", tmp_path / "labels", "--foreground", "0.95").out)
    assert again == report

    stage = {"stage": "regions", "base": str(place / "base"), "labels": [str(tmp_path / "labels")], "shared_layers": 3}
    path = recipe(tmp_path / "regions.yaml", **stage, zoom={"sink": "none", "region_threshold": 0.0})
    plan = json.loads(here("train", "regions", "--recipe", path, "--dry-run", "--json").out)
    assert (plan["samples"], plan["phases"][0]["steps"]) == (report["usable"], 2)
    trained = here("train", "regions", "--recipe", path, "-o", tmp_path / "run", *SMALL)
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["steps"] == 2
    zoomed = here(
        "ask", place / "1.png", "Which number?", "-m", tmp_path / "run" / "model", "--zoom", "always", "--json", "-q"
    )
    assert zoomed.code == 0, zoomed.err
    assert json.loads(zoomed.out)["regions"]

    words = ("--questions", place / "q.jsonl", "-m", tmp_path / "run" / "model", "--max-new-tokens", "3", *SMALL)
    for more in (("--tokens", "4,8,16"), ("--by", "zoom", "--tokens", "12,20")):
        labelled = here("label", "gate", *words, *more, "-o", tmp_path / f"gate{len(more)}")
        counts = json.loads(labelled.out)
        assert labelled.code == (counts["closer"] + counts["enough"] == 0), labelled.err
        assert counts["questions"] == 6
        assert counts["closer"] + counts["enough"] + counts["dropped"] == 6
    mined = here(
        "label", "hard-cases", *words, "--coarse-tokens", "12", "--region-tokens", "12", "-o", tmp_path / "mined"
    )
    figures = json.loads(mined.out)
    assert mined.code == (figures["undecided"] == figures["turns"]), mined.err
    assert figures["turns"] == 6
    assert sum(figures[kind] for kind in ("hard", "improvements", "both_right", "both_wrong", "undecided")) == 6


def test_no_usable_label_is_code_1_with_the_reasons(here, place, tmp_path):
    settings = tmp_path / "labels.yaml"
    settings.write_text("maps: {min_peak: 0.0, ignore_share: 0.0}\n")
    spread = label(here, place, "-o", tmp_path / "spread", "--recipe", settings)
    figures = json.loads(spread.out)
    assert (spread.code, figures["usable"], figures["too_weak"], figures["too_large"]) == (1, 0, 0, 6)
    settings.write_text("maps: {min_peak: 100.0, ignore_share: 1.0}\n")
    weak = label(here, place, "-o", tmp_path / "weak", "--recipe", settings)
    figures = json.loads(weak.out)
    assert (weak.code, figures["usable"], figures["too_weak"], figures["too_large"]) == (1, 0, 6, 0)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_images_that_cannot_be_read_are_labelled_later_and_two_processes_label_what_one_does(
    here, place, tmp_path, processes
):
    (tmp_path / "moved").mkdir()
    for number in range(5):
        shutil.copy(place / f"{number}.png", tmp_path / "moved")
    words = (place, "-o", tmp_path / "labels", "--foreground", "0.95", "--processes", str(processes))
    some = label(here, *words, "--images", tmp_path / "moved")
    figures = json.loads(some.out)
    assert (some.code, figures["questions"], figures["unread"], figures["skipped"]) == (1, 5, 1, 0)
    assert "5.png of question 'q5' is missing" in figures["unread_reason"]
    assert missing_samples(tmp_path / "labels") == 1
    shutil.copy(place / "5.png", tmp_path / "moved")
    whole = label(here, *words, "--images", tmp_path / "moved")
    figures = json.loads(whole.out)
    assert (whole.code, figures["questions"], figures["unread"]) == (0, 6, 0)
    one = label(here, place, "-o", tmp_path / "one", "--foreground", "0.95", "--images", tmp_path / "moved")
    assert figures == json.loads(one.out)
    stores = [RecordStore(tmp_path / name) for name in ("one", "labels")]
    assert stores[0].samples == {key: stores[1].samples[key] for key in stores[0].samples}
    written = [f"records-{number:02}.jsonl" for number in range(processes)]
    assert sorted(path.name for path in (tmp_path / "labels").glob("records-*")) == written


def test_unfinished_labels_are_counted_before_training(here, place, tmp_path):
    assert label(here, place, "-o", tmp_path / "labels", "--foreground", "0.95").code == 0
    store = tmp_path / "labels" / "records-00.jsonl"
    assert missing_samples(tmp_path / "labels") == 0
    store.write_text("".join(store.read_text().splitlines(keepends=True)[:4]))
    assert missing_samples(tmp_path / "labels") == 3
    path = recipe(
        tmp_path / "regions.yaml", stage="regions", base=str(place / "base"), labels=[str(tmp_path / "labels")]
    )
    plan = here("train", "regions", "--recipe", path, "--dry-run", "--json")
    assert "the labels of 3 questions are missing" in plan.err
    assert label(here, place, "-o", tmp_path / "labels", "--foreground", "0.95").code == 0
    assert missing_samples(tmp_path / "labels") == 0


def test_nothing_is_left_by_a_training_whose_base_or_labels_are_missing(here, place, tmp_path):
    for base in ("no/such/base", str(place / "base")):
        path = recipe(tmp_path / "r.yaml", stage="regions", base=base, labels=[str(tmp_path / "none")])
        here("train", "regions", "--recipe", path, "-o", tmp_path / "run", *SMALL).refuses(1)
        assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("mine")
    made = label(here, place, "-o", tmp_path / "file")
    path = recipe(tmp_path / "r.yaml", stage="regions", base=str(place / "base"), labels=["none"])
    trained = here("train", "regions", "--recipe", path, "-o", tmp_path / "file", *SMALL)
    for result in (made, trained):
        result.refuses(2, "is a file; name a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_nan_in_a_settings_file_is_refused(here, place, tmp_path):
    settings = tmp_path / "nan.yaml"
    for text, key in (("maps: {min_peak: .nan}", "maps.min_peak"), ("sink_ratio: .inf", "sink_ratio")):
        settings.write_text(text + "\n")
        result = label(here, place, "-o", tmp_path / "labels", "--recipe", settings)
        result.refuses(2, "nan.yaml, line 1: ", key)
        assert not (tmp_path / "labels").exists()


def test_bad_lines_stop_or_are_counted(here, place, tmp_path):
    bad = place / "bad.jsonl"
    bad.write_text((place / "q.jsonl").read_text() + '{"id": "x"}\n')
    words = ("label", "regions", "--questions", bad, "-m", place / "base", "--heads", "2:1", "--tokens", "20")
    easy = tmp_path / "easy.yaml"
    easy.write_text("maps: {min_peak: 0.0, ignore_share: 1.0, foreground: 0.95}\n")
    words = (*words, "--max-new-tokens", "3", "-o", tmp_path / "labels", "--recipe", easy)
    here(*words, *SMALL).refuses(1, "bad.jsonl, line 7")
    assert not (tmp_path / "labels").exists()
    counted = here(*words, "--skip-bad", *SMALL)
    assert counted.code == 0, counted.err
    assert json.loads(counted.out)["skipped_lines"] == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("label", "regions", "--questions", "none.jsonl", "-o", "x"), 1, "cannot be read"),
        (
            ("label", "gate", "--questions", "documents:0:1", "-o", "x", "--tokens", "64;128"),
            2,
            "tokens[0] must be a whole number of at least 1, not '64;128'",
        ),
        (
            ("label", "gate", "--questions", "documents:0:1", "-o", "x", "--tokens", "64,32,128"),
            2,
            "three or more rising",
        ),
        (("label", "regions", "--questions", "documents:0:1", "-o", "x", "--foreground", "1.5"), 2, "from 0 to 1"),
        (("label", "regions", "--questions", "documents:0:1", "-o", "x", "--rows"), 2, "add --from boxes"),
        (("label", "gate", "--questions", "documents:0:1", "-o", "x", "--rows"), 2, "--rows"),
        (("label", "regions", "--questions", "documents:0:1", "-o", "x", "--recipe", "none.yaml"), 2, "cannot be read"),
        (("train", "regions", "--recipe", "none.yaml", "-o", "x"), 2, "cannot be read"),
        (
            ("label", "hard-cases", "--questions", "documents:0:1", "-o", "x", "--judge-url", "http://127.0.0.1:1"),
            2,
            "--judge-model",
        ),
        (
            (
                "label",
                "hard-cases",
                "--questions",
                "documents:0:1",
                "-o",
                "x",
                "--judge-url",
                "x",
                "--judge-model",
                "m",
            ),
            2,
            "--judge-url",
        ),
        (("convert", "labels", "none.pkl"), 2, "--output"),
        (("convert", "labels", "none.pkl", "-o", "x"), 1, "no such file"),
        (("convert", "a", "b", "-o", "x"), 2, "labels PICKLE"),
    ],
)
def test_mistakes_are_one_sentence(here, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    here(*words).refuses(code, message)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("label", "regions", "--questions", "documents:0:1", "--recipe"), "view: square\nmaps:\n  foreground: 7\n"),
        (("label", "gate", "--questions", "documents:0:1", "--recipe"), "by: zoom\n\nmax_new_tokens: 0\n"),
        (("label", "hard-cases", "--questions", "documents:0:1", "--recipe"), "# mine\n\nfoo: 1\n"),
        (("train", "regions", "--recipe"), "stage: regions\nlabels: [x]\nbase: [tiny]\n"),
        (("train", "answers", "--recipe"), "stage: answers\nlabels: [x]\nlora_rank: -1\nbase: tiny\n"),
        (("train", "gate", "--recipe"), "stage: gate\nlabels: [x]\nprecision: half\nbase: tiny\n"),
        (("train", "student"), "base: tiny\nmethod: sft\nsftt: {}\n"),
        (("distill",), "pictures: [documents:0:1]\nsteps: []\nengine: spark\n"),
    ],
)
def test_a_wrong_value_in_a_recipe_is_a_wrong_call(here, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(text)
    here(*words, "my.yaml", "-o", "x").refuses(2, "my.yaml, line ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [("hard-cases",), ("gate", "--by", "zoom")])
def test_zooming_needs_a_region_branch(here, place, tmp_path, words):
    here("label", *words, "--questions", place / "q.jsonl", "-m", place / "base", "-o", tmp_path / "m", *SMALL).refuses(
        1, "has no region branch"
    )
