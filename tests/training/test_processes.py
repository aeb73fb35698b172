"""A stage trained by several processes, as torchrun and accelerate start them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qzoom.checkpoints.load import load_engine
from tests.training.runs import ROUNDING, recipe_of, run, same, weights_in, written


def launch_words(folder, processes, recipe):
    path = written(recipe, folder.with_suffix(".yaml"))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*words, "-m", "qzoom", "train", recipe.stage, "--recipe", str(path), "-o", str(folder), "--device", "cpu"]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def launch(folder, processes, recipe, environment=ENVIRONMENT):
    words = [*launch_words(folder, processes, recipe), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def losses_in(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_give_the_result_of_one(world, tmp_path):
    recipe = recipe_of(world, micro_batch=1, steps=3)
    run(recipe, tmp_path / "one")
    assert launch(tmp_path / "two", 2, recipe)["steps"] == 3
    same(weights_in(tmp_path / "one"), weights_in(tmp_path / "two"), ROUNDING)
    assert losses_in(tmp_path / "one") == pytest.approx(losses_in(tmp_path / "two"), abs=1e-5)


def decoder_recipe(world, **changes):
    values = {"stage": "answers", "labels": (str(world / "mined"),), "tokens": (12,), "region_tokens": 8, "batch": 2}
    return recipe_of(world, **values | {"micro_batch": 1} | changes)


def assert_same_decoder(world, one, two):
    """Equal but for rounding: where a gradient is nearly zero, it decides more of Adam's step than elsewhere."""
    made, other = (load_engine(folder / "model").backbone for folder in (one, two))
    weights, others = made.model.state_dict(), other.model.state_dict()
    every = torch.cat([(others[name] - value).abs().flatten() for name, value in weights.items()])
    assert float((every > ROUNDING).float().mean()) < 1e-4
    assert float(every.max()) < 10 * ROUNDING
    base = load_engine(world / "base").backbone.model.state_dict()
    assert any((value - base[name]).abs().max() > 50 * ROUNDING for name, value in weights.items())
    assert losses_in(one) == pytest.approx(losses_in(two), abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_train_lora_as_one_does(world, tmp_path):
    """The whole model is what DDP wraps here, all of its own weights frozen."""
    pytest.importorskip("peft")
    recipe = decoder_recipe(world, steps=2, lora_rank=2)
    run(recipe, tmp_path / "one")
    launch(tmp_path / "two", 2, recipe)
    assert_same_decoder(world, tmp_path / "one", tmp_path / "two")
    assert load_engine(tmp_path / "two" / "model").lora is not None


def fsdp_environment():
    """What `accelerate launch` makes of the shipped config for the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp.yaml"
    words = path.read_text().splitlines()[0].removeprefix("# accelerate launch ").split()
    assert words[:3] == ["--config_file", "recipes/accelerate/fsdp.yaml", "-m"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([words[0], str(path), *words[2:]]))
    assert arguments.use_fsdp
    assert (arguments.num_processes, arguments.mixed_precision) == (8, "no")
    environment = prepare_multi_gpu_env(arguments)
    return ENVIRONMENT | {name: value for name, value in environment.items() if "FSDP" in name}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sharded_run_that_is_killed_resumes_and_ends_as_one_process_does(world, tmp_path):
    """FSDP2 on two processes of a CPU (gloo), with the shipped config, over the whole model."""
    environment = fsdp_environment()
    assert environment["FSDP_VERSION"] == "2"
    recipe, folder = decoder_recipe(world, steps=3), tmp_path / "two"
    run(recipe, tmp_path / "one")
    process = subprocess.Popen(
        launch_words(folder, 2, recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | environment, start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not ((folder / "metrics.jsonl").exists() and losses_in(folder)):
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    report = launch(folder, 2, recipe, environment)
    assert 1 <= report["start"] <= report["steps"] == 3
    assert_same_decoder(world, tmp_path / "one", folder)
