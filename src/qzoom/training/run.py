"""What the runs of stages and students share: context, files, metrics and results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.store.log import atomic_path, differences, unwritable

METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"

TrackerName = Literal["tensorboard", "wandb", "mlflow"]

R = TypeVar("R")


def _nothing(*_: Any) -> None:
    """The callback of a run that nobody watches."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRun(Generic[R]):
    """The context of one run."""

    engine: Engine  # the model; the weights that are selected train in place
    recipe: R  # the settings
    folder: Path  # of checkpoints and metrics; a phase of a student has one of its own
    device: str = "cpu"  # "cpu" or "cuda"
    on_step: Callable[[StepMetrics], None] = _nothing  # called on the main process with the metrics of each step
    # called when a phase of a student begins, with its name and number of optimiser steps
    on_phase: Callable[[str, int], None] = _nothing
    on_validation: Callable[[Any], None] = _nothing  # called with each validation of a student

    @property
    def processes(self) -> int:
        """Processes that share a batch, as torchrun or `accelerate launch` started them."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return not int(os.environ.get("RANK", "0"))


# -- the same run ----------------------------------------------------------------------------------------------------


def without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A recipe's values but these names at any depth: what a resumed run must share."""
    return {k: without(v, names) if isinstance(v, dict) else v for k, v in values.items() if k not in names}


def check_same_run(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run that was started with other settings (ConfigError: it names what changed)."""
    changed = differences(there, json.loads(json.dumps(here)))
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:3])}); use --fresh to replace it, or "
            "another output."
        )


# -- files -----------------------------------------------------------------------------------------------------------


def clear_run(folder: Path, names: Sequence[str]) -> None:
    """Delete files and folders of an earlier run."""
    for name in (*names, REPORT_FILE):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as a whole: an interrupted write leaves the file before (DataError: the disk
    refuses)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_path(path) as partial:
            save_file({name: _own(tensor) for name, tensor in tensors.items()}, partial, metadata=dict(metadata))
    except SafetensorError as error:
        raise unwritable(path, error) from error


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory, as safetensors demands."""
    copy = tensor.detach().cpu().contiguous()
    return copy.clone() if tensor.device.type == "cpu" else copy


def read_tensors(path: Path, *, only_metadata: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (none with `only_metadata`) and metadata of a safetensors file (DataError: it is damaged)."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            names = () if only_metadata else file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except Exception as error:
        raise DataError(f"{path} cannot be read; restore it or start over with --fresh.") from error


def copy_weights(weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the weights of the same names."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that a run resumed after `step` writes again, and damaged ones."""
    lines = [line for line in _lines(path) if step > 0 and line["step"] <= step]
    if path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            _ = line["step"] + 0
        except (ValueError, KeyError, TypeError):
            continue
        yield line


# -- metrics ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step."""

    step: int  # from 1
    steps: int  # of the whole run
    loss: float  # mean over the targets of the batch
    learning_rate: float  # of this step
    gradient_norm: float  # before clipping
    samples_per_s: float  # since this process started
    left_s: float  # seconds until the end at that rate


class MetricsLog:
    """Writes the metrics of every step to `metrics.jsonl` and to the recipe's trackers (ConfigError: a tracker that is
    not installed). `start`: steps that are done already; lines of later steps are dropped."""

    def __init__(self, run: TrainingRun[Any], *, start: int, steps: int, batch: int) -> None:
        self._path = run.folder / METRICS_FILE
        self._start, self._steps, self._batch = start, steps, batch
        self._on_step = run.on_step
        self._began = time.monotonic()
        truncate_log(self._path, start)
        self._path.touch()
        self._trackers = open_trackers(run.recipe.trackers, run.folder, start)

    def add(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Log a step (from 1)."""
        done = step - self._start
        rate = done * self._batch / max(time.monotonic() - self._began, 1e-9)
        left = (self._steps - step) * self._batch / rate
        metrics = StepMetrics(step, self._steps, loss, learning_rate, gradient_norm, rate, left)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
        values = {name: getattr(metrics, name) for name in ("loss", "learning_rate", "gradient_norm", "samples_per_s")}
        for tracker in self._trackers:
            tracker.log(values, step=step)
        self._on_step(metrics)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(names: Sequence[TrackerName], folder: Path, start: int) -> list[Any]:
    """Accelerate's trackers of these names; tensorboard writes into the run's folder and is left out where it is not
    installed.

    Args:
        start: steps that are done already; event files of later steps are dropped.

    Raises:
        ConfigError: another tracker that is not installed.
    """
    from accelerate import tracking

    kinds: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", str(folder), purge_step=start + 1),
        "wandb": lambda: tracking.WandBTracker("qzoom", name=folder.name, dir=str(folder)),
        "mlflow": lambda: tracking.MLflowTracker("qzoom", run_name=folder.name),
    }
    missing = [name for name in names if find_spec(name) is None]
    for name in missing:
        if name != "tensorboard":
            raise ConfigError(f"The tracker {name} is not installed; install it with: pip install {name}.")
    trackers = [kinds[name]() for name in names if name not in missing]
    for tracker in trackers:
        tracker.start()
    return trackers


def mean_losses(folder: Path) -> tuple[float | None, float | None]:
    """Mean loss of the first and of the last tenth of a run's steps, resumed or not; None without steps."""
    losses = [float(line["loss"]) for line in _lines(folder / METRICS_FILE)]
    tenth = max(1, len(losses) // 10)
    return (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth) if losses else (None, None)


# -- results ---------------------------------------------------------------------------------------------------------


def save_model(run: TrainingRun[Any], report: Any, provenance: Mapping[str, Any], *, whole: bool) -> None:
    """Write `report.json` and `model`: the whole model, or an adapter that refers to its base.

    The provenance holds facts for the model's config, by the name of what trained; the report is added to them.
    """
    engine, model = run.engine, run.engine.backbone.model
    dtype = engine.backbone.dtype
    if whole:
        dtype = torch.bfloat16 if run.recipe.precision == "bfloat16" else torch.float32
        model.to(dtype).requires_grad_(False).eval()
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.to(dtype).requires_grad_(False)
    figures = {name: value for name, value in asdict(report).items() if name != "model"}
    facts = {name: dict(values) | {"report": figures} for name, values in provenance.items()}
    facts = engine.config.provenance | json.loads(json.dumps(facts))
    engine = dataclasses.replace(engine, config=engine.config.replace(provenance=facts))
    if whole:
        save_pretrained(engine, run.folder / "model", include_base=True)
    else:
        revision = getattr(model.config, "_commit_hash", None)
        save_pretrained(engine, run.folder / "model", base_id=base_of(engine), base_revision=revision)
    text = json.dumps(asdict(report), indent=2) + "\n"
    (run.folder / REPORT_FILE).write_text(text, encoding="utf-8")


def base_of(engine: Engine) -> str:
    """Hub id or folder that the base model was loaded from (ConfigError: it is not known)."""
    name = str(getattr(engine.backbone.model.config, "_name_or_path", "") or "")
    if not name:
        raise ConfigError("Where the base model comes from is not known, so an adapter cannot refer to it.")
    return name


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Hide the FutureWarnings of peft, transformers and trl about names that they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
