import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from qzoom.data.questions import read_receipts
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.evaluation.score import row_score
from qzoom.integrations.lmms_eval import decoding, tasks_folder
from qzoom.model import QZoom

RECEIPTS = Path(__file__).parents[3] / "shared" / "data" / "receipts"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed; docs/evaluation.md says how"
)
needs_receipts = pytest.mark.skipif(not RECEIPTS.is_dir(), reason="the scanned receipts are not beside the repository")


def test_the_task_is_shipped_and_the_entry_point_declared():
    file = tasks_folder() / "qzoom_receipts" / "qzoom_receipts.yaml"
    text = file.read_text(encoding="utf-8").replace("!function ", "")
    task = yaml.safe_load(text)
    assert task["task"] == "qzoom_receipts"
    assert [metric["metric"] for metric in task["metric_list"]] == ["exact_match", "anls"]
    assert (file.parent / "utils.py").is_file()
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '[project.entry-points."lmms_eval.models"]\nqzoom = "qzoom.integrations.lmms_eval:manifest"' in (
        project.read_text(encoding="utf-8")
    )


def test_the_folder_is_printed():
    done = subprocess.run(
        [sys.executable, "-m", "qzoom.integrations.lmms_eval"], capture_output=True, text=True, timeout=300, check=True
    )
    assert Path(done.stdout.strip()) == tasks_folder()


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({}, {"max_new_tokens": 128, "stop": []}),
        ({"until": "\n\n", "max_new_tokens": 16, "do_sample": False}, {"max_new_tokens": 16, "stop": ["\n\n"]}),
        ({"do_sample": True, "temperature": 0, "top_p": 0.9}, {"max_new_tokens": 128, "stop": []}),
        ({"do_sample": True}, {"max_new_tokens": 128, "stop": [], "temperature": 1.0, "top_p": 1.0}),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "until": ["a", ""]},
            {"max_new_tokens": 128, "stop": ["a"], "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        ),
    ],
)
def test_generation_settings_of_a_task(wanted, options):
    assert decoding(wanted) == options
    assert decoding(wanted, 5) == options | {"max_new_tokens": 5}


@needs_harness
def test_the_harness_finds_the_model():
    from lmms_eval.models.registry_v2 import ModelManifest

    found = importlib.metadata.entry_points(group="lmms_eval.models")
    manifest = {entry.name: entry for entry in found}["qzoom"].load()()
    assert isinstance(manifest, ModelManifest)
    assert manifest.chat_class_path == "qzoom.integrations.lmms_eval_model.QZoomChat"


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretraind=tiny", "did you mean 'pretrained'"),
        ("zoom=often", "zoom must be one of"),
        ("batch_size=auto", "batch_size must be a whole number"),
        ("max_visual_tokens=10,coarse_tokens=20", "contradict"),
    ],
)
def test_bad_model_args(arguments, said):
    from qzoom.errors import ConfigError
    from qzoom.integrations.lmms_eval_model import QZoomChat

    with pytest.raises(ConfigError, match=said):
        QZoomChat.create_from_arg_string(arguments, {"device": "cpu"})


@needs_harness
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_question_whose_picture_cannot_be_opened_gets_the_empty_answer(tmp_path, batch_size):
    from qzoom.integrations.lmms_eval_model import QZoomChat

    def messages(doc):
        image = Image.open(tmp_path / doc).convert("RGB")
        content = [{"type": "image", "url": image}, {"type": "text", "text": "What?"}]
        return [{"role": "user", "content": content}]

    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no picture")
    chat = QZoomChat("tiny", zoom="never", max_new_tokens=2, batch_size=batch_size, device="cpu")
    chat.task_dict = {"task": {"test": ["a.png", "b.png", "c.png"]}}
    requests = [SimpleNamespace(args=("What?", messages, {}, number, "task", "test")) for number in range(3)]
    answers = chat.generate_until(requests)
    assert answers[1].text == ""
    assert answers[0].text == answers[2].text
    assert [answer.token_counts.output_tokens > 0 for answer in answers] == [True, False, True]


@needs_harness
@needs_receipts
@pytest.mark.slow
def test_the_same_score_as_our_runner(monkeypatch):
    """Twenty questions about scanned receipts, by the embedded model, both ways."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("QZOOM_RECEIPTS", str(RECEIPTS))
    from qzoom.config import TokenBudget

    model = QZoom.from_pretrained("tiny", device_map="cpu")
    low = (model.config.coarse_tokens or model.engine.backbone.default_budget()).min_tokens
    half = TokenBudget(min(low, 144), 144)
    ours = run(model, read_receipts(RECEIPTS, "dev"), EvalOptions("auto", half, half), limit=7)[:20]
    found = simple_evaluate(
        model="qzoom", model_args="pretrained=tiny,zoom=auto,coarse_tokens=144,region_tokens=144,device=cpu",
        tasks=["qzoom_receipts"],
        task_manager=TaskManager(include_path=str(tasks_folder()), include_defaults=False, model_name="qzoom"),
        limit=20, batch_size=4, log_samples=True,
    )  # fmt: skip
    samples = sorted(found["samples"]["qzoom_receipts"], key=lambda sample: sample["doc_id"])
    said = [sample["filtered_resps"][0] for sample in samples]
    assert said == [row.prediction for row in ours]
    figures = found["results"]["qzoom_receipts"]
    assert figures["exact_match,none"] == pytest.approx(sum(map(row_score, ours)) / 20)
