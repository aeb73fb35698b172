"""What both trainers are told alike: where, how precisely, how often they save, and to keep quiet.

The recipe of a distillation run: one YAML file, checked when it is read.

The defaults are those of a big model. `method` names what runs: supervised training on the agreed answers (sft),
reinforcement with a reward by rule (grpo), or the one after the other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qzoom.config import from_mapping, read_yaml
from qzoom.data.overlay import STYLES, Fade
from qzoom.errors import ConfigError
from qzoom.training.student.schedule import Windows

__all__ = [
    "METHODS",
    "DistillRecipe",
    "GrpoPart",
    "JudgePart",
    "Place",
    "PointingPart",
    "SftPart",
    "common_arguments",
    "load_distill_recipe",
    "silence",
]


_KEPT = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part runs.

    Args:
        folder: of its checkpoints.
        device: "cpu" or "cuda".
        processes: that share a batch.
    """

    folder: Path
    device: str = "cpu"
    processes: int = 1

    def forwards(self, together: int) -> int:
        """Forward passes of each process, of those that all make together.

        Raises:
            ConfigError: they cannot be shared equally.
        """
        if together % self.processes:
            raise ConfigError(
                f"A step of {together} forwards cannot be shared by {self.processes} processes; change batch or "
                "micro_batch."
            )
        return together // self.processes


def common_arguments(recipe: DistillRecipe, place: Place) -> dict[str, Any]:
    """Arguments of trl's configurations that do not depend on the method."""
    return {
        "output_dir": str(place.folder),
        "use_cpu": place.device == "cpu",
        "bf16": recipe.precision == "bfloat16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": _KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "optim": "adamw_torch",
        "dataloader_pin_memory": place.device != "cpu",
    }


def silence(trainer: Any) -> None:
    """Take out the callbacks that print."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)


METHODS = ("sft", "grpo", "sft+grpo")
FREE = ("micro_batch", "gradient_checkpointing", "cache_gb", "tensorboard", "output", "save_steps", "loaders")
"""Settings that a resumed run may change."""


@dataclass(frozen=True, slots=True)
class SftPart:
    """Supervised training.

    Args:
        learning_rate: peak.
        schedule: "constant", "linear" or "cosine" after the warm-up.
        warmup: share of the steps with a rising learning rate.
        batch: pictures per optimiser step.
        micro_batch: pictures per forward.
        questions: most questions of one picture in one sequence; each sees the picture and itself alone.
        epochs: passes over the data; `steps` above 0 overrules it.
        steps: optimiser steps.
        weight_decay: of all but biases and norms; with Muon, of its matrices alone.
        betas: of AdamW.
        clip: largest gradient norm.
        optimizer: "adamw", or "muon": Muon for the matrices, AdamW for the rest, at one rate.
    """

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.03
    batch: int = 64
    micro_batch: int = 4
    questions: int = 4
    epochs: float = 1.0
    steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ConfigError(f"betas must hold two numbers, not {self.betas!r}.")
        for beta in self.betas:
            _number("betas", beta, 0.0, 1.0)
        _one_of("optimizer", self.optimizer, ("adamw", "muon"))
        _one_of("schedule", self.schedule, ("constant", "linear", "cosine"))
        _whole("batch", self.batch, 1)
        _whole("micro_batch", self.micro_batch, 1)
        _whole("questions", self.questions, 1)
        _whole("steps", self.steps, 0)
        _number("learning_rate", self.learning_rate, 0.0, 1.0)
        _number("warmup", self.warmup, 0.0, 1.0)
        _number("epochs", self.epochs, 0.0, 1000.0)
        _number("weight_decay", self.weight_decay, 0.0, 10.0)
        _number("clip", self.clip, 0.0, 1e6)
        _divides(self.batch, self.micro_batch)


@dataclass(frozen=True, slots=True)
class JudgePart:
    """A language model for free answers that rules cannot decide; without `url` they count as wrong.

    Args:
        url: of an OpenAI-compatible API.
        model: its name there.
        key_env: environment variable of its key.
        timeout_s: of one request.
        budget: most requests of a run.
    """

    url: str = ""
    model: str = ""
    key_env: str = "QZOOM_JUDGE_KEY"
    timeout_s: float = 60.0
    budget: int = 100_000

    def __post_init__(self) -> None:
        if self.url and not self.model:
            raise ConfigError("judge: a url needs the model's name there.")
        _number("timeout_s", self.timeout_s, 0.001, 1e5)
        _whole("budget", self.budget, 0)


@dataclass(frozen=True, slots=True)
class GrpoPart:
    """Reinforcement: several answers a question, those better than their group's mean become likelier.

    Args:
        learning_rate: constant.
        batch: questions per optimiser step; each gets `group` answers.
        micro_batch: answers per forward.
        group: answers of one question.
        epochs: passes over the data; `steps` above 0 overrules it.
        steps: optimiser steps.
        clip_low: the ratio is kept above 1 minus it.
        clip_high: and below 1 plus it.
        dual_clip: largest ratio where the advantage is negative.
        temperature: of the answers.
        max_new_tokens: longest answer.
        format_weight: share of the reward for a well-formed answer.
        counting: reward numbers by relative error instead of all or nothing.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        judge: for free answers.
    """

    learning_rate: float = 1e-6
    batch: int = 96
    micro_batch: int = 8
    group: int = 8
    epochs: float = 1.0
    steps: int = 0
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float = 3.0
    temperature: float = 1.0
    max_new_tokens: int = 2048
    format_weight: float = 0.0
    counting: bool = False
    weight_decay: float = 0.01
    clip: float = 1.0
    judge: JudgePart = field(default_factory=JudgePart)

    def __post_init__(self) -> None:
        if isinstance(self.judge, dict):
            object.__setattr__(self, "judge", from_mapping(JudgePart, self.judge, "judge"))
        if not isinstance(self.judge, JudgePart):
            raise ConfigError(f"judge must be a mapping of settings, not {self.judge!r}.")
        _whole("batch", self.batch, 1)
        _whole("micro_batch", self.micro_batch, 1)
        _whole("group", self.group, 2)
        _whole("steps", self.steps, 0)
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _boolean("counting", self.counting)
        _number("learning_rate", self.learning_rate, 0.0, 1.0)
        _number("epochs", self.epochs, 0.0, 1000.0)
        _number("clip_low", self.clip_low, 0.0, 1.0)
        _number("clip_high", self.clip_high, 0.0, 10.0)
        _number("dual_clip", self.dual_clip, 1.0, 100.0)
        _number("temperature", self.temperature, 1e-3, 10.0)
        _number("format_weight", self.format_weight, 0.0, 1.0)
        _number("weight_decay", self.weight_decay, 0.0, 10.0)
        _number("clip", self.clip, 0.0, 1e6)
        _divides(self.batch * self.group, self.micro_batch)


@dataclass(frozen=True, slots=True)
class PointingPart:
    """Privileged regions shown to the attention: heads learn to look at the region while the answer is written.

    Args:
        weight: of this loss beside the answers'; 0 leaves it out.
        layer: of the decoder.
        heads: of that layer.
    """

    weight: float = 0.0
    layer: int = 0
    heads: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _number("weight", self.weight, 0.0, 100.0)
        _whole("layer", self.layer, 0)
        if not isinstance(self.heads, list | tuple) or not self.heads:
            raise ConfigError(f"heads must be a list of whole numbers, not {self.heads!r}.")
        object.__setattr__(self, "heads", tuple(self.heads))
        for head in self.heads:
            _whole("heads", head, 0)


@dataclass(frozen=True, slots=True)
class DistillRecipe:
    """One run.

    Args:
        base: hub id, folder or "tiny": the student before training.
        data: folder that `qzoom distill` exported to.
        output: where to write when the command line does not say.
        method: "sft", "grpo" or "sft+grpo".
        tokens: largest numbers of visual tokens of the full view, one drawn per step; empty takes what
            `qzoom ask --zoom never` takes.
        styles: how the region is marked, by weight: rectangle, ellipse, dim, text, none.
        fade: share of samples with a marked region as training goes on; `share` of first, last, shape, until.
        clause: add the sentence that points to the marked region.
        pointing: attention heads that learn to look at the region, marked or not; supervised training only.
        instruction: added to every question, in training and validation alike.
        answer_form: "plain" (the answer alone) or "tags" (in answer tags).
        longest_plain: characters up to which a reply without tags counts as the answer.
        negatives: share of questions whose target is absent; null keeps the data's own.
        replay: share of pictures that are freshly drawn with questions of their own, against forgetting.
        lora_rank: 0 trains all weights; else LoRA of this rank, merged at the end.
        vision: train the vision tower too.
        precision: "bfloat16" computes in it; "float32".
        gradient_checkpointing: recompute layers in the backward pass.
        cache_gb: keep resized pictures in memory, up to so many GB (10^9 bytes) in each process that loads.
        validation: share of the pictures held out, where the data have no split of their own.
        validation_items: most questions of a validation.
        validation_tokens: visual tokens of the validated view; 0 takes what `qzoom ask --zoom never` takes.
        validation_steps: optimiser steps between validations.
        max_new_tokens: longest validated answer.
        save_steps: optimiser steps between checkpoints.
        seed: of order, boxes, replay and sampling.
        tensorboard: also write event files, where tensorboard is installed.
        sft: supervised training.
        grpo: reinforcement.
        keep: weights of the "best" validation, or of the "last": a small validation is a noisy judge of a schedule
            that brings the learning rate down at its end.
        windows: parts of pictures that some steps of supervised training show instead.
        loaders: processes that prepare batches of supervised training ahead, for a GPU that would wait; 0 for none.
    """

    base: str
    data: str = ""
    output: str = ""
    method: Literal["sft", "grpo", "sft+grpo"] = "grpo"
    tokens: tuple[int, ...] = ()
    styles: dict[str, float] = field(default_factory=lambda: {"rectangle": 1.0})
    fade: Fade = field(default_factory=lambda: Fade(1.0, 1.0, "constant"))
    clause: bool = True
    pointing: PointingPart = field(default_factory=PointingPart)
    instruction: str = ""
    answer_form: Literal["plain", "tags"] = "plain"
    longest_plain: int = 300
    negatives: float | None = None
    replay: float = 0.0
    lora_rank: int = 0
    vision: bool = True
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    cache_gb: float = 0.0
    validation: float = 0.05
    validation_items: int = 400
    validation_tokens: int = 0
    validation_steps: int = 50
    max_new_tokens: int = 64
    save_steps: int = 50
    seed: int = 0
    tensorboard: bool = True
    sft: SftPart = field(default_factory=SftPart)
    grpo: GrpoPart = field(default_factory=GrpoPart)
    keep: Literal["best", "last"] = "best"
    windows: Windows = field(default_factory=Windows)
    loaders: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.base, str) or not self.base:
            raise ConfigError("base must name the model to train.")
        for name in ("data", "output", "instruction"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, not {getattr(self, name)!r}.")
        _one_of("method", self.method, METHODS)
        _one_of("keep", self.keep, ("best", "last"))
        _one_of("answer_form", self.answer_form, ("plain", "tags"))
        _one_of("precision", self.precision, ("float32", "bfloat16"))
        for name in ("clause", "vision", "gradient_checkpointing", "tensorboard"):
            _boolean(name, getattr(self, name))
        self._check_lists()
        for name in ("longest_plain", "validation_items", "validation_steps", "max_new_tokens", "save_steps"):
            _whole(name, getattr(self, name), 1)
        for name in ("lora_rank", "validation_tokens", "seed", "loaders"):
            _whole(name, getattr(self, name), 0)
        _number("replay", self.replay, 0.0, 0.95)
        _number("validation", self.validation, 0.0, 0.9)
        _number("cache_gb", self.cache_gb, 0.0, 1e5)
        if self.negatives is not None:
            _number("negatives", self.negatives, 0.0, 0.95)

    def _check_lists(self) -> None:
        if not isinstance(self.tokens, list | tuple):
            raise ConfigError(f"tokens must be a list of whole numbers, not {self.tokens!r}.")
        object.__setattr__(self, "tokens", tuple(self.tokens))
        for value in self.tokens:
            _whole("tokens", value, 1)
        if not isinstance(self.styles, dict) or not self.styles:
            raise ConfigError(f"styles must be a mapping of styles to weights, not {self.styles!r}.")
        for style, weight in self.styles.items():
            _one_of("styles", style, STYLES)
            _number("styles", weight, 0.0, 1e6)
        if sum(self.styles.values()) <= 0:
            raise ConfigError("styles need a weight above 0.")

    def decisive(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for part in (values, values["sft"], values["grpo"]):
            for name in FREE:
                part.pop(name, None)
        return values


_PARTS: dict[str, type] = {
    "fade": Fade,
    "pointing": PointingPart,
    "sft": SftPart,
    "grpo": GrpoPart,
    "windows": Windows,
}


def load_distill_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> DistillRecipe:
    """Read a YAML recipe.

    Args:
        path: of the file.
        changes: settings that the command line gives instead.

    Raises:
        ConfigError: the file is missing or no YAML, an unknown key (with the closest known one), or a bad value.
    """
    values = read_yaml(path) | dict(changes or {})
    where = str(path)
    try:
        for name, kind in _PARTS.items():
            if name in values:
                where = f"{path}: {name}"
                values[name] = from_mapping(kind, values[name], where)
        where = str(path)
        recipe: DistillRecipe = from_mapping(DistillRecipe, values, where)
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{where}: {error}") from error
    return recipe


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}.")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least}, not {value!r}.")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")


def _divides(whole: int, part: int) -> None:
    if whole % part:
        raise ConfigError(f"a step of {whole} cannot be cut into forwards of {part}; choose a divisor as micro_batch.")
