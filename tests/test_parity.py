"""The recorded numbers all pass, and a run notices wrong, unknown and missing ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity.__main__ import main
from tests.parity.report import Report
from tests.parity.run import run_all

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared/reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the recorded cases are not beside the repository")


def problems(report: Report) -> dict[str, list[str]]:
    return {case.name: case.problems for case in report.cases if case.problems}


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder made of links, of which single files can be replaced."""
    for path in source.rglob("*"):
        new = target / path.relative_to(source)
        if path.is_dir():
            new.mkdir(parents=True, exist_ok=True)
        else:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.symlink_to(path)
    return target


def only_case(folder: Path, case_id: str) -> None:
    """Leave one case and no training cases in a linked model folder."""
    cases = [entry for entry in json.loads((folder / "cases.json").read_text()) if entry["id"] == case_id]
    (folder / "cases.json").unlink()
    (folder / "cases.json").write_text(json.dumps(cases))
    for path in [*(folder / "cases").iterdir(), *(folder / "training").iterdir()]:
        if path.stem != case_id:
            path.unlink()


def recorded(folder: Path) -> int:
    """How many cases a folder of the reference holds, by its own lists."""
    if folder.name == "llava":
        return sum(recorded_llava(path) for path in folder.iterdir() if path.is_dir())
    if folder.name == "labels":
        stage1, boxes, stage3 = (
            json.loads((folder / name).read_text())
            for name in ("stage1_labels.json", "box_to_pixels.json", "stage3_labels.json")
        )
        maps = sum(len(triple["runs"]) for triple in stage1["triples"])
        return maps + len(stage1["known_background_masks"]) + len(boxes) + sum(len(part) for part in stage3.values())
    cases, training = (json.loads((folder / n).read_text()) for n in ("cases.json", "training/training.json"))
    return len(cases) + len(training)


def recorded_llava(folder: Path) -> int:
    """The same for a folder below llava."""
    if folder.name != "labels":
        return recorded(folder)
    lists = [json.loads((folder / f"llava_{name}.json").read_text()) for name in ("map_to_boxes", "box_to_pixels")]
    stage1 = json.loads((folder / "llava_stage1_labels.json").read_text())
    attention = json.loads((folder / "attention/llava_attention.json").read_text())
    return sum(map(len, [*lists, attention["items"], *(pair["runs"] for pair in stage1["pairs"])]))


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("name", ["labels", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_every_recorded_case_passes(name):
    report = run_all(REFERENCE / name)
    assert problems(report) == {}
    assert report.passed == recorded(REFERENCE / name) > 0


@needs_reference
def test_the_command_ends_with_one_line(tmp_path, capsys):
    folder = linked(REFERENCE / "labels", tmp_path / "labels")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{recorded(folder)} passed, 0 failed"
    rows = json.loads((folder / "box_to_pixels.json").read_text())
    rows[0]["box_pixel_xyxy"][0] += 1
    (folder / "box_to_pixels.json").unlink()
    (folder / "box_to_pixels.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "tests.parity", str(folder)]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1] == f"{recorded(folder) - 1} passed, 1 failed"


@needs_reference
def test_wrong_numbers_fail_their_case(tmp_path):
    case_id = "gate_newpos.wide.interior"
    folder = linked(REFERENCE / "qwen3_vl", tmp_path / "model")
    only_case(folder, case_id)
    assert run_all(folder).summary == "1 passed, 0 failed"
    path = folder / f"cases/{case_id}.safetensors"
    tensors = load_file(path)
    shifts = {"two_stage_logits": 1e-3, "roi_logits": 1e-4, "gate_score": 1e-4, "roi_features": 1e-3}
    for name, shift in shifts.items():
        tensors[name].view(-1)[-1] += shift
    path.unlink()
    save_file(tensors, path)
    (found,) = problems(run_all(folder)).values()
    assert {problem.split(": off by")[0] for problem in found} == set(shifts)


@needs_reference
def test_what_nothing_names_is_a_failure(tmp_path):
    folder = linked(REFERENCE / "labels", tmp_path / "labels")
    (folder / "stage9_labels.json").write_text("{}")
    assert list(problems(run_all(folder))) == ["stage9_labels.json"]
    model = linked(REFERENCE / "qwen3_vl", tmp_path / "qwen3_vl")
    only_case(model, "gate_newpos.wide.gate_no")
    path = model / "cases/gate_newpos.wide.gate_no.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "something_new": tensors["gate_score"].clone()}, path)
    save_file(tensors, model / "cases/nobody.safetensors")
    found = problems(run_all(model))
    assert found["qwen3_vl/gate_newpos.wide.gate_no"] == ["every tensor compared: not compared: ['something_new']"]
    assert found["cases/nobody.safetensors"] == ["no case names it"]


def test_empty_folders_and_no_numbers_fail(tmp_path):
    assert run_all(tmp_path).summary == "0 passed, 1 failed"
    assert run_all(tmp_path / "nowhere").summary == "0 passed, 1 failed"
    report = Report()
    with report.case("kind", "name") as case:
        case.close("value", float("nan"), 1.0, 1e-3)
    assert report.failed == 1
