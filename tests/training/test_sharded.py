"""FSDP and DeepSpeed: accelerate takes the shipped configs, and what FSDP holds in pieces comes back whole.

Training with them needs several GPUs and is not tested; FSDP itself also runs on two processes of a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qzoom.errors import ConfigError
from qzoom.training.sharded import check_sharding
from qzoom.training.stages import StageRecipe

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}


def launch_environment(path, monkeypatch):
    """What `accelerate launch` makes of a config for the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = path.read_text().splitlines()[0].removeprefix("# accelerate launch ").split()
    assert words[:3] == ["--config_file", f"recipes/accelerate/{path.name}", "-m"]
    monkeypatch.chdir(ROOT)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.module
    return arguments, prepare_multi_gpu_env(arguments)


def test_accelerates_own_loader_takes_the_configs():
    from accelerate.commands.config.config_args import load_config_from_file

    assert set(FILES) == {"fsdp", "deepspeed"}
    for path in FILES.values():
        config = load_config_from_file(str(path))
        assert (config.num_processes, config.mixed_precision) == (8, "no")
        assert path.read_text().splitlines()[1].startswith("# Not run:")
    assert load_config_from_file(str(FILES["fsdp"])).distributed_type.value == "FSDP"
    assert load_config_from_file(str(FILES["deepspeed"])).distributed_type.value == "DEEPSPEED"


def test_fsdp_is_set_up_as_the_config_says(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    arguments, environment = launch_environment(FILES["fsdp"], monkeypatch)
    assert arguments.use_fsdp
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False


def test_deepspeed_is_set_up_as_the_config_says(monkeypatch):
    arguments, _ = launch_environment(FILES["deepspeed"], monkeypatch)
    assert arguments.use_deepspeed
    assert (arguments.zero_stage, arguments.gradient_clipping, arguments.gradient_accumulation_steps) == (2, 1.0, 1)


def accelerator_like(kind, **more):
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=8, **more)


def test_what_cannot_work_is_refused():
    recipe = StageRecipe(stage="answers", base="x", labels=("y",), batch=64, micro_batch=1, clip=0.5)
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_sharding(accelerator_like("FSDP", is_fsdp2=False), recipe)
    check_sharding(accelerator_like("FSDP", is_fsdp2=True), recipe)
    settings = {}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    with pytest.raises(ConfigError, match="set micro_batch to 8"):
        check_sharding(accelerator_like("DEEPSPEED", state=state), recipe)
    whole = StageRecipe(stage="answers", base="x", labels=("y",), batch=64, micro_batch=8, clip=0.5)
    check_sharding(accelerator_like("DEEPSPEED", state=state), whole)
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_clipping"]) == (8, 0.5)


@pytest.mark.timeout(900)
def test_what_fsdp_holds_in_pieces_is_gathered_and_restored():
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["-m", "tests.training.shard_process"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["states"] == {"0.weight": 3, "2.weight": 3, "2.bias": 3}  # the frozen bias has none
    assert found["moved"] > 0.05
    assert found["resumed"] == 0
    assert found["alone"] < 1e-6
