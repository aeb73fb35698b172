"""The training loop of the stages: accelerate for the processes, the rest in plain sight.

    batch (the same on every process) -> this process's samples -> micro-batches -> summed loss * processes / targets

Transformers' Trainer would average the means of its micro-batches; here the loss is a sum over the targets of the whole
batch, divided by their number. A checkpoint is replaced as a whole, so a run that is killed ends bit for bit as if it
had not been. With FSDP (version 2) what is sharded is gathered for checkpoints and for the result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.training.run import MetricsLog, TrainingRun, check_same_run, copy_weights, read_tensors, save_tensors
from qzoom.training.samples import SampleUse, StageTask
from qzoom.training.stages import StageRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_FILE = "checkpoint.safetensors"
BASE_ZOOM = "base_zoom"
"""In a run's identity: region branch and zoom settings of the base. Runs begun by older versions lack it and go on."""
_STATE = ("exp_avg", "exp_avg_sq", "step")

States = Mapping[str, Mapping[str, Any]]
"""The optimiser's state of each weight, by the weight's name."""


class StageModule(nn.Module):
    """What accelerate wraps: the modules in which something trains, and a forward pass that is the stage's loss.

    They are the engine's own modules, so that DDP and FSDP act on what the engine runs. Modules in which nothing
    trains are reached through the engine and are neither copied nor synchronised.
    """

    def __init__(self, engine: Engine, task: StageTask, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        ids = {id(weight) for weight in weights.values()}
        for name, part in (("region", engine.region), ("gate", engine.gate), ("model", engine.backbone.model)):
            if part is not None and any(id(weight) in ids for weight in part.parameters()):
                self.add_module(name, part)
        self._engine = [engine]  # a list, so that nn.Module does not register the frozen modules as well
        self._task = task

    def forward(self, uses: Sequence[SampleUse]) -> Tensor:
        """Summed loss of some samples."""
        return self._task.loss(self._engine[0], uses)


def make_accelerator(recipe: StageRecipe, device: str) -> Accelerator:
    """The processes of a run; torchrun or `accelerate launch` decide how many there are (ConfigError: a batch that the
    processes cannot share equally, or a kind of sharding that is not supported)."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    shared = DistributedDataParallelKwargs(broadcast_buffers=False)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError("DeepSpeed is not supported; shard with FSDP, see recipes/accelerate/fsdp.yaml.")
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[shared])
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate ignores its FSDP settings on CPUs and would use DDP, although torch shards there too (gloo)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if _is_sharded(accelerator) and not accelerator.is_fsdp2:
        raise ConfigError("FSDP is supported in version 2 only; set fsdp_version: 2 in accelerate's config.")
    if recipe.batch % accelerator.num_processes:
        raise ConfigError(
            f"A batch of {recipe.batch} cannot be shared by {accelerator.num_processes} processes; choose a multiple."
        )
    return accelerator


def steps_of(recipe: StageRecipe, samples: int) -> int:
    """Optimiser steps of a run."""
    return recipe.steps or max(1, round(recipe.epochs * samples / recipe.batch))


def batch_of(step: int, recipe: StageRecipe, samples: int) -> list[SampleUse]:
    """The samples of a step (from 0): every sample once per epoch, in an order that only the seed decides."""
    first = step * recipe.batch
    out = []
    order: list[int] = []
    epoch = -1
    for position in range(first, first + recipe.batch):
        if position // samples != epoch:
            epoch = position // samples
            order = random.Random(f"{recipe.seed}/order/{epoch}").sample(range(samples), samples)
        out.append(SampleUse(order[position % samples], epoch))
    return out


def learning_rate_at(step: int, steps: int, recipe: StageRecipe) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine to zero."""
    warm = math.ceil(recipe.warmup * steps)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def run_loop(
    run: TrainingRun[StageRecipe],
    task: StageTask,
    weights: dict[str, nn.Parameter],
    accelerator: Accelerator,
    identity: Mapping[str, Any],
) -> tuple[int, dict[str, Tensor] | None]:
    """Train, from the folder's checkpoint if there is one.

    Args:
        identity: what a resumed run must share, stored in the checkpoint.

    Returns:
        The optimiser steps that were done before. With FSDP, which leaves the engine's weights in shards, also the
        whole trained weights by name (empty on all processes but the main one); None otherwise.

    Raises:
        ConfigError: the folder holds a run with other settings.
        DataError: the loss is not finite, or the disk refuses.
    """
    recipe, samples = run.recipe, len(task.weights)
    steps = steps_of(recipe, samples)
    optimiser = torch.optim.AdamW(
        weights.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    start = load_checkpoint(run.folder, weights, optimiser, identity)
    state = _TrainingState(StageModule(run.engine, task, weights), weights, optimiser, accelerator)
    log = None
    if accelerator.is_main_process:
        log = MetricsLog(run, start=start, steps=steps, batch=recipe.batch)
    for step in range(start, steps):
        rate = learning_rate_at(step, steps, recipe)
        for group in state.optimiser.param_groups:
            group["lr"] = rate
        loss = _backward(state.module, task, batch_of(step, recipe, samples), recipe, accelerator)
        if not math.isfinite(loss):
            raise DataError(f"The loss of step {step + 1} is not finite; lower the learning rate or use float32.")
        norm = accelerator.clip_grad_norm_(state.module.parameters(), recipe.clip or math.inf)
        state.optimiser.step()
        state.optimiser.zero_grad(set_to_none=True)
        if (step + 1) % recipe.save_steps == 0 or step + 1 == steps:
            tensors, states = state.whole()
            if accelerator.is_main_process:
                save_checkpoint(run.folder, step + 1, identity, tensors, states)
        if log is not None:
            log.add(step + 1, loss, rate, 0.0 if norm is None else float(norm))
    if log is not None:
        log.close()
    accelerator.wait_for_everyone()
    return start, state.whole()[0] if _is_sharded(accelerator) else None


def _backward(
    module: nn.Module, task: StageTask, uses: Sequence[SampleUse], recipe: StageRecipe, accelerator: Accelerator
) -> float:
    """Gradients of the batch's mean loss, in micro-batches; returns that loss."""
    world, rank = accelerator.num_processes, accelerator.process_index
    targets = sum(task.weights[use.index] for use in uses)
    own = uses[rank::world]
    micro_batches = [own[i : i + recipe.micro_batch] for i in range(0, len(own), recipe.micro_batch)]
    total = torch.zeros((), device=accelerator.device)
    for number, some in enumerate(micro_batches):
        waiting = accelerator.no_sync(module) if number + 1 < len(micro_batches) else contextlib.nullcontext()
        with waiting:
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                loss = module(some)
            # processes average their gradients, so each carries its share times their number
            accelerator.backward(loss * (world / targets))
        total += loss.detach().float() / targets
    return float(accelerator.reduce(total, reduction="sum"))


def save_checkpoint(
    folder: Path, step: int, identity: Mapping[str, Any], weights: Mapping[str, Tensor], states: States
) -> None:
    """Write the checkpoint after so many steps, with what a resumed run must share and the optimiser's states
    (DataError: the disk refuses)."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"weight.{name}"] = weight
        for key, value in states[name].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    save_tensors(folder / CHECKPOINT_FILE, tensors, {"step": str(step), "run": json.dumps(identity)})


def load_checkpoint(
    folder: Path, weights: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> int:
    """Restore weights and optimiser; returns the steps done, 0 without a checkpoint (ConfigError: the checkpoint is of
    a run with other settings; DataError: it is damaged or of another model)."""
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path)
    try:
        step, earlier = int(metadata["step"]), json.loads(metadata["run"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} cannot be read; restore it or start over with --fresh.") from error
    check_same_run(earlier, {k: v for k, v in identity.items() if k in earlier or k != BASE_ZOOM}, folder)
    if {name for name in tensors if name.startswith("weight.")} != {f"weight.{name}" for name in weights}:
        raise DataError(f"{path} holds the weights of another model; use --fresh or another output.")
    copy_weights(weights, {name: tensors[f"weight.{name}"] for name in weights})
    for name, weight in weights.items():
        state = {key: tensors[f"{key}.{name}"] for key in _STATE if f"{key}.{name}" in tensors}
        if state:
            optimiser.state[weight] = {k: v if k == "step" else v.to(weight.device) for k, v in state.items()}
    return step


def _is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP shards the weights."""
    return str(accelerator.distributed_type.value) == "FSDP"


class _TrainingState:
    """Module and optimiser as accelerate wraps them, and how to get whole tensors back out of them."""

    def __init__(
        self,
        module: StageModule,
        weights: dict[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        names = {id(weight): name for name, weight in module.named_parameters()}
        self._names = {name: names[id(weight)] for name, weight in weights.items()}
        self._weights, self._stock, self._sharded = weights, optimiser, _is_sharded(accelerator)
        states = {self._names[name]: dict(optimiser.state.get(weight, {})) for name, weight in weights.items()}
        if self._sharded:
            optimiser.state.clear()
        self.module, self.optimiser = accelerator.prepare(module, optimiser)
        if self._sharded and any(states.values()):
            self._restore(states)

    def whole(self) -> tuple[dict[str, Tensor], States]:
        """Weights and the optimiser's state by the weights' names; every process must call it.

        With FSDP they are copies on the CPU, and empty on all processes but the main one.
        """
        if not self._sharded:
            return dict(self._weights), {n: self.optimiser.state.get(w, {}) for n, w in self._weights.items()}
        from torch.distributed.checkpoint import state_dict

        options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = state_dict.get_model_state_dict(self.module, options=options)
        if not weights:
            state_dict.get_optimizer_state_dict(self.module, self._stock, options=options)
            return {}, {}
        states: Any = state_dict.get_optimizer_state_dict(self.module, self._stock, options=options).get("state", {})
        return (
            {name: weights[own] for name, own in self._names.items()},
            {name: states.get(own, {}) for name, own in self._names.items()},
        )

    def _restore(self, states: States) -> None:
        """Give the sharded optimiser the whole state of a checkpoint, by the module's names."""
        from torch.distributed.checkpoint import state_dict

        options = state_dict.StateDictOptions(full_state_dict=True)
        whole: Any = state_dict.get_optimizer_state_dict(self.module, self._stock, options=options)
        whole["state"] = {name: dict(state) for name, state in states.items()}
        state_dict.set_optimizer_state_dict(self.module, self._stock, whole, options=options)
