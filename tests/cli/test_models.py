import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qzoom.cli.main import run

ROOT = Path(__file__).resolve().parents[2]


def test_models(here):
    result = here("models")
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert " yes " in lines["tiny"]
    assert lines["YuhengSSS/Q-Zoom-Qwen3VL-4B"].split()[1] == "yes"
    assert lines["Qwen/Qwen3-VL-4B-Instruct"].split()[1] == "no"
    rows = {row["id"]: row for row in json.loads(here("models", "--json").out)["models"]}
    assert 8.5 < rows["Qwen/Qwen3-VL-4B-Instruct"]["gigabytes"] < 9.1  # 4.4 billion weights
    assert rows["YuhengSSS/Q-Zoom-Qwen3VL-4B"]["gigabytes"] > rows["Qwen/Qwen3-VL-4B-Instruct"]["gigabytes"]


def test_recipes_and_copies(here, tmp_path, monkeypatch):
    listed = json.loads(here("recipes", "--json").out)["recipes"]
    files = {str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in ROOT.glob("recipes/*/*.yaml")}
    assert {entry["name"] for entry in listed} == files
    assert all("qzoom " in entry["command"] for entry in listed if not entry["name"].startswith("tiny/"))
    assert "qwen3-vl-4b/regions " in here("recipes").out
    monkeypatch.chdir(tmp_path)
    original = (ROOT / "recipes/qwen3-vl-4b/regions.yaml").read_bytes()
    assert here("recipes", "copy", "qwen3-vl-4b/regions").out == "recipes/qwen3-vl-4b/regions.yaml\n"
    assert (tmp_path / "recipes/qwen3-vl-4b/regions.yaml").read_bytes() == original
    assert here("recipes", "copy", "recipes/qwen3-vl-4b/gate.yaml", tmp_path).out == f"{tmp_path}/gate.yaml\n"
    again = here("recipes", "copy", "qwen3-vl-4b/regions")
    assert again.is_one_sentence
    assert again.code == 2
    assert "exists; give another place, or --force" in again.err
    assert here("recipes", "copy", "qwen3-vl-4b/regions", "--force").code == 0
    wrong = here("recipes", "copy", "qwen3-vl-4b/region")
    assert wrong.is_one_sentence
    assert "there is no recipe 'qwen3-vl-4b/region'; did you mean 'qwen3-vl-4b/regions'" in wrong.err


@pytest.mark.parametrize(
    ("words", "cursor", "expected"),
    [
        ("qzoom per", 1, "perceive"), ("qzoom eva", 1, "eval"), ("qzoom train re", 2, "regions"),
        ("qzoom ask --zo", 2, "--zoom"),
    ],
)  # fmt: skip
def test_completion(words, cursor, expected, monkeypatch, capsys):
    for name, value in (("_QZOOM_COMPLETE", "complete_bash"), ("COMP_WORDS", words), ("COMP_CWORD", str(cursor))):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        run([])
    assert capsys.readouterr().out.split() == [expected]


def test_completion_script():
    program = "from qzoom.cli.main import main; main()"
    command = [sys.executable, "-c", program, "--show-completion", "bash"]
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "_QZOOM_COMPLETE=complete_bash" in done.stdout, done.stderr
