"""A run's checkpoint: the weights that train, the optimiser's state and the step, in one safetensors file.

It is replaced as a whole, so a run that is killed at any point goes on from the last one, bit for bit as if it had not
been. The frozen base is not in it.

What a run tells while it goes: a line of JSON per step, TensorBoard's event files, and a bar with the time left.

The loop that all stages share: accelerate for processes, the rest in plain sight.

Why accelerate and not transformers' Trainer: a step here is a picture with a changing number of sequences and targets,
and its loss is a sum over the targets of the whole batch, divided by their number over all processes and parts. The
Trainer averages the means of its parts, saves whole models, and wants samples as dictionaries of equal tensors.

    batch (the same on every process) -> this process's samples -> parts -> summed loss * processes / targets
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.training.samples import Draw, StageTask
from qzoom.training.sharded import check_sharding, gather, restore_optimiser, uses_deepspeed, uses_fsdp
from qzoom.training.stages import StageRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Checkpoint",
    "Metrics",
    "StageModule",
    "StepFacts",
    "batch_of",
    "check_same_run",
    "learning_rate_at",
    "load_checkpoint",
    "make_accelerator",
    "run_loop",
    "save_checkpoint",
    "steps_of",
]


CHECKPOINT_NAME = "checkpoint.safetensors"
_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run is.

    Args:
        step: optimiser steps done.
        run: what decides the run, as JSON values.
    """

    step: int
    run: dict[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, weights: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write it; an interrupted write leaves the one before.

    Args:
        folder: of the run.
        checkpoint: where the run is.
        weights: those that train, by name.
        states: the optimiser's state of each.

    Raises:
        DataError: the disk refuses.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
        for key, value in states[name].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    metadata = {"step": str(checkpoint.step), "run": json.dumps(checkpoint.run)}
    partial = folder / f"{CHECKPOINT_NAME}.partial"
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, folder / CHECKPOINT_NAME)
    except Exception as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(
            f"{folder / CHECKPOINT_NAME} cannot be written ({reason}); check space and rights, then run again."
        ) from error


def load_checkpoint(
    folder: Path, weights: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, run: Mapping[str, Any]
) -> int:
    """Restore weights and optimiser; returns the steps done, 0 without a checkpoint.

    Raises:
        ConfigError: the checkpoint is of a run with other settings.
        DataError: it is damaged or of another model.
    """
    from safetensors import safe_open

    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            step, made = int(metadata["step"]), json.loads(metadata["run"])
            check_same_run(made, dict(run), folder)
            names = set(file.keys())
            wanted = {f"weight.{name}" for name in weights}
            if {name for name in names if name.startswith("weight.")} != wanted:
                raise DataError(f"{path} holds the weights of another model; use --fresh or another output.")
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(file.get_tensor(f"weight.{name}"))
                    state = {k: file.get_tensor(f"{k}.{name}") for k in _STATE if f"{k}.{name}" in names}
                    if state:
                        optimiser.state[weight] = {
                            key: value if key == "step" else value.to(weight.device) for key, value in state.items()
                        }
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read; restore it or start over with --fresh.") from error
    return step


def check_same_run(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings.

    Raises:
        ConfigError: it names what changed.
    """
    here = json.loads(json.dumps(here))
    changed = []
    for key in dict.fromkeys([*there, *here]):
        if there.get(key) != here.get(key):
            changed.append(f"{key} was {there.get(key)!r:.60}, is {here.get(key)!r:.60}")
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:3])}); use --fresh to replace it, or "
            "another output."
        )


METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One optimiser step.

    Args:
        step: from 1.
        steps: of the whole run.
        loss: mean over the targets of the batch.
        learning_rate: of this step.
        gradient_norm: before clipping.
        samples_per_s: since this process started.
        left_s: seconds until the end at that rate.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    samples_per_s: float
    left_s: float


class Metrics:
    """Writes the facts of every step; lines of steps that a resumed run repeats are dropped first.

    Args:
        folder: of the run.
        start: steps done already.
        steps: of the whole run.
        batch: samples per step.
        tensorboard: also write event files, if tensorboard is installed.
        on_step: called with each step's facts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        steps: int,
        batch: int,
        tensorboard: bool,
        on_step: Callable[[StepFacts], None],
    ) -> None:
        self._path = folder / METRICS_FILE
        self._start, self._steps, self._batch = start, steps, batch
        self._on_step = on_step
        self._began = time.monotonic()
        self._keep_until(start)
        self._board = _board(folder / "tensorboard", start) if tensorboard else None

    def add(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Note a step (from 1)."""
        done = step - self._start
        rate = done * self._batch / max(time.monotonic() - self._began, 1e-9)
        left = (self._steps - step) * self._batch / rate
        facts = StepFacts(step, self._steps, loss, learning_rate, gradient_norm, rate, left)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(facts)) + "\n")
        if self._board is not None:
            for name in ("loss", "learning_rate", "gradient_norm", "samples_per_s"):
                self._board.add_scalar(name, getattr(facts, name), step)
        self._on_step(facts)

    def close(self) -> None:
        """Finish the event files."""
        if self._board is not None:
            self._board.close()

    def _keep_until(self, step: int) -> None:
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    fine = json.loads(line)["step"] <= step
                except (ValueError, KeyError, TypeError):
                    fine = False
                if fine:
                    kept.append(line + "\n")
        self._path.write_text("".join(kept), encoding="utf-8")


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


class StageModule(nn.Module):
    """What is handed to accelerate: the parts in which something trains, and a forward pass that is the stage's loss.

    They are the engine's own modules, so that whatever wraps this one (DDP, FSDP) acts on what the engine runs. Parts
    in which nothing trains are reached through the engine and are neither copied nor synchronised.

    Args:
        engine: everything.
        task: data and loss.
        weights: those that train, by name.
    """

    def __init__(self, engine: Engine, task: StageTask, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        ids = {id(weight) for weight in weights.values()}
        for name, part in (("region", engine.region), ("gate", engine.gate), ("model", engine.backbone.model)):
            if part is not None and any(id(weight) in ids for weight in part.parameters()):
                self.add_module(name, part)
        self._engine = [engine]
        self._task = task

    def forward(self, draws: Sequence[Draw]) -> Tensor:
        """Summed loss of some samples."""
        return self._task.loss(self._engine[0], draws)


@dataclass(frozen=True, slots=True)
class LoopReport:
    """What a run came to.

    Args:
        steps: optimiser steps.
        started_at: the step that this process started from.
        losses: of this process's steps.
        gathered: the whole state of `StageModule` where the engine's own weights are left in pieces, else None.
    """

    steps: int
    started_at: int
    losses: tuple[float, ...]
    gathered: dict[str, Tensor] | None = None


def make_accelerator(recipe: StageRecipe, device: str) -> Accelerator:
    """The processes of a run; torchrun or `accelerate launch` decide how many there are.

    Raises:
        ConfigError: a batch that the processes cannot share equally.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    shared = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[shared])
    if recipe.batch % accelerator.num_processes:
        raise ConfigError(
            f"A batch of {recipe.batch} cannot be shared by {accelerator.num_processes} processes; choose a multiple."
        )
    check_sharding(accelerator, recipe)
    return accelerator


def steps_of(recipe: StageRecipe, samples: int) -> int:
    """Optimiser steps of a run."""
    return recipe.steps or max(1, round(recipe.epochs * samples / recipe.batch))


def batch_of(step: int, recipe: StageRecipe, samples: int) -> list[Draw]:
    """The samples of a step (from 0): every sample once per pass, in an order that only the seed decides."""
    first = step * recipe.batch
    out = []
    order: list[int] = []
    visit = -1
    for position in range(first, first + recipe.batch):
        if position // samples != visit:
            visit = position // samples
            order = random.Random(f"{recipe.seed}/order/{visit}").sample(range(samples), samples)
        out.append(Draw(order[position % samples], visit))
    return out


def learning_rate_at(step: int, steps: int, recipe: StageRecipe) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine to zero."""
    warm = math.ceil(recipe.warmup * steps)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def run_loop(
    engine: Engine,
    task: StageTask,
    weights: dict[str, nn.Parameter],
    recipe: StageRecipe,
    folder: Path,
    run: dict[str, Any],
    accelerator: Accelerator,
    *,
    on_step: Callable[[StepFacts], None] = lambda _: None,
) -> LoopReport:
    """Train; goes on from the folder's checkpoint.

    Args:
        engine: its selected weights are trained in place.
        task: data and loss.
        weights: those that train, by name.
        recipe: how.
        folder: of checkpoint and metrics.
        run: what decides the run, kept in the checkpoint.
        accelerator: processes.
        on_step: called on the main process with each step's facts.

    Raises:
        ConfigError: the folder holds a run with other settings.
        DataError: the loss is not finite, or the disk refuses.
    """
    samples, steps = len(task.weights), steps_of(recipe, len(task.weights))
    optimiser = torch.optim.AdamW(
        weights.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    start = load_checkpoint(folder, weights, optimiser, run)
    held = _Held(StageModule(engine, task, weights), weights, optimiser, accelerator)
    told = {"start": start, "steps": steps, "batch": recipe.batch, "tensorboard": recipe.tensorboard}
    metrics = Metrics(folder, **told, on_step=on_step) if accelerator.is_main_process else None  # type: ignore[arg-type]
    losses = []
    for step in range(start, steps):
        rate = learning_rate_at(step, steps, recipe)
        for group in held.optimiser.param_groups:
            group["lr"] = rate
        loss = _backward(held.module, task, batch_of(step, recipe, samples), recipe, accelerator)
        if not math.isfinite(loss):
            raise DataError(f"The loss of step {step + 1} is not finite; lower the learning rate or use float32.")
        norm = accelerator.clip_grad_norm_(held.module.parameters(), recipe.clip or math.inf)
        held.optimiser.step()
        held.optimiser.zero_grad(set_to_none=True)
        losses.append(loss)
        if (step + 1) % recipe.save_steps == 0 or step + 1 == steps:
            held.save(folder, Checkpoint(step + 1, run))
        if metrics is not None:
            metrics.add(step + 1, loss, rate, 0.0 if norm is None else float(norm))
    if metrics is not None:
        metrics.close()
    accelerator.wait_for_everyone()
    return LoopReport(steps, start, tuple(losses), held.gathered())


class _Held:
    """Module and optimiser as accelerate wraps them, and how to get whole tensors back out of them.

    Args:
        module: what trains.
        weights: its trained weights by their names in checkpoints.
        optimiser: over these, with the state of an earlier checkpoint.
        accelerator: processes.
    """

    def __init__(
        self,
        module: StageModule,
        weights: dict[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> None:
        names = {id(weight): name for name, weight in module.named_parameters()}
        self._names = {name: names[id(weight)] for name, weight in weights.items()}
        self._weights, self._raw, self._accelerator = weights, optimiser, accelerator
        kept = {self._names[name]: dict(optimiser.state.get(weight, {})) for name, weight in weights.items()}
        if uses_fsdp(accelerator):
            optimiser.state.clear()
        self.module, self.optimiser = accelerator.prepare(module, optimiser)
        if uses_fsdp(accelerator) and any(kept.values()):
            restore_optimiser(self.module, optimiser, kept)

    def save(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Write a checkpoint from the main process; DeepSpeed gets none."""
        if uses_deepspeed(self._accelerator):
            return
        tensors: dict[str, Tensor] = dict(self._weights)
        states = {name: self.optimiser.state.get(weight, {}) for name, weight in self._weights.items()}
        if uses_fsdp(self._accelerator):
            whole, found = gather(self.module, self._raw)
            tensors = {name: whole[own] for name, own in self._names.items()}
            states = {name: found.get(own, {}) for name, own in self._names.items()}
        if self._accelerator.is_main_process:
            save_checkpoint(folder, checkpoint, tensors, states)

    def gathered(self) -> dict[str, Tensor] | None:
        """See `LoopReport.gathered`; every process must call it."""
        if uses_fsdp(self._accelerator):
            return gather(self.module, self._raw)[0]
        if uses_deepspeed(self._accelerator):
            return dict(self._accelerator.get_state_dict(self.module) or {})
        return None


def _backward(
    module: nn.Module, task: StageTask, draws: Sequence[Draw], recipe: StageRecipe, accelerator: Accelerator
) -> float:
    """Gradients of the batch's mean loss, in parts; returns that loss."""
    world, rank = accelerator.num_processes, accelerator.process_index
    targets = sum(task.weights[draw.index] for draw in draws)
    own = draws[rank::world]
    parts = [own[i : i + recipe.micro_batch] for i in range(0, len(own), recipe.micro_batch)]
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts):
        waiting = accelerator.no_sync(module) if number + 1 < len(parts) else contextlib.nullcontext()
        with waiting:
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                loss = module(part)
            # processes average their gradients, so each carries its share times their number
            accelerator.backward(loss * (world / targets))
        total += loss.detach().float() / targets
    return float(accelerator.reduce(total, reduction="sum"))
