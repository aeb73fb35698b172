"""`qzoom train student` as a command: in two processes it takes the steps that one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qzoom.cli.main import run as command

ROOT = Path(__file__).parents[3]
RECIPE = {
    "method": "sft",
    "tokens": [12],
    "precision": "float32",
    "gradient_checkpointing": False,
    "validation_steps": 100,
    "max_new_tokens": 4,
    "tensorboard": False,
    "sft": {"learning_rate": 0.003, "warmup": 0.0, "batch": 4, "micro_batch": 2, "steps": 2},
}


def words(student, data, folder) -> list[str]:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(RECIPE | {"base": str(student)}))
    return ["train", "student", str(path), "--data", str(data), "-o", str(folder), "--device", "cpu", "--json"]


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_take_the_steps_of_one(student, data, tmp_path, capsys):
    assert command(words(student, data, tmp_path / "one")) == 0
    alone = json.loads(capsys.readouterr().out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "qzoom"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    together = words(student, data, tmp_path / "two")
    done = subprocess.run(
        launch + together, capture_output=True, text=True, env=env, cwd=ROOT, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for found in (alone, shared):
        assert (found["questions"], found["negatives"], found["held_out"]) == (24, 8, 4)
        assert (Path(found["model"]) / "qzoom.safetensors").is_file()
