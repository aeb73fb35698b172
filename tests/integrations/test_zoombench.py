import importlib.util

import pytest
import yaml

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.data.benchmarks.registry import open_task
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.evaluation.score import score
from qzoom.evaluation.zoom_views import GapSettings, region_task
from qzoom.integrations.lmms_eval import tasks_folder
from qzoom.model import QZoom
from tests.data.benchmarks.test_zoombench import ROW, parquet
from tests.tiny_models import engine

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed; docs/evaluation.md says how"
)


def test_the_task_is_shipped_beside_the_code():
    file = tasks_folder() / "zoombench" / "zoombench.yaml"
    task = yaml.safe_load(file.read_text(encoding="utf-8").replace("!function ", ""))
    assert (task["task"], task["dataset_path"], task["test_split"]) == ("zoombench", "inclusionAI/ZoomBench", "test")
    assert [metric["metric"] for metric in task["metric_list"]] == ["strict", "harness", "mcq", "blank"]
    assert (file.parent / "utils.py").is_file()


@needs_harness
@pytest.mark.parametrize("view", ["full", "region"])
def test_the_same_scores_as_our_runner(tmp_path, monkeypatch, view):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    reader = engine("qwen3_vl")
    checkpoint = save_pretrained(reader, tmp_path / "random", include_base=True)
    model = QZoom(reader, "random")
    blank = {"query": "How many?", "response": "3", "question_type": "blank", "bbox": [0, 0, 60, 80]}
    first = parquet(tmp_path, [ROW, blank])
    options = EvalOptions("never", max_new_tokens=3)
    said = [row.prediction for row in run(model, open_task("zoombench", data=first), options)]
    # the right answer of the second question is what the model says, so that something scores
    rows = [ROW, blank | {"response": said[1].strip() or "3"}, ROW | {"response": "F"}]
    data = parquet(tmp_path, rows)
    task = open_task("zoombench", data=data)
    ours = score(run(model, task, options), task.fields)
    monkeypatch.setenv("QZOOM_ZOOMBENCH", str(data))
    monkeypatch.setenv("QZOOM_ZOOMBENCH_VIEW", view)
    found = simple_evaluate(
        model="qzoom",
        model_args=f"pretrained={checkpoint},zoom=never,max_new_tokens=3,device=cpu",
        tasks=["zoombench"],
        task_manager=TaskManager(include_path=str(tasks_folder()), include_defaults=False, model_name="qzoom"),
        batch_size=1,
        log_samples=True,
    )
    samples = sorted(found["samples"]["zoombench"], key=lambda sample: sample["doc_id"])
    assert len(samples) == 3
    if view == "region":
        targets = tuple((name, number, 0) for number, name in enumerate(task.ids[:2]))
        region = region_task(task, "region", targets, GapSettings(crop_margin=0.0, crop_min_px=1), 1)
        asked = run(model, region, options)
        assert [sample["filtered_resps"][0] for sample in samples[:2]] == [row.prediction for row in asked]
        return
    figures = found["results"]["zoombench"]
    assert ours.n == 3
    assert ours.strict["all"] > 0
    assert figures["strict,none"] == pytest.approx(ours.strict["all"])
    assert figures["harness,none"] == pytest.approx(ours.harness["all"])
    assert figures["mcq,none"] == pytest.approx(ours.strict["mcq"])
    assert figures["blank,none"] == pytest.approx(ours.strict["blank"])


@needs_harness
def test_a_box_beside_the_picture_is_an_error_of_the_region_view(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("zoombench_utils", tasks_folder() / "zoombench" / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    beside = ROW | {"bbox": [500, 500, 510, 510]}
    monkeypatch.setenv("QZOOM_ZOOMBENCH", str(parquet(tmp_path, [ROW, beside])))
    for view, failed in (("full", [False, False]), ("region", [False, True])):
        monkeypatch.setenv("QZOOM_ZOOMBENCH_VIEW", view)
        docs = [utils._row(number) for number in range(2)]
        assert [bool(doc["error"]) for doc in docs] == failed
        scores = [utils.process_results(doc, ["B"])["strict"] for doc in docs]
        assert scores == [("mcq", 1.0), ("mcq", 0.0 if view == "region" else 1.0)]
    assert utils.doc_to_visual(docs[1])[0].size == (64, 64)
