"""The recipe of a student: one YAML file. The defaults are those for a large model."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from qzoom.data.overlay import STYLES, ShareSchedule
from qzoom.errors import ConfigError
from qzoom.llm.settings import EndpointSettings
from qzoom.settings import Between, Share, Text, settings, to_dict
from qzoom.training.run import TrackerName, without
from qzoom.training.stages import Count, CountOrNone
from qzoom.training.student.schedule import RandomCrops

RESUMABLE_CHANGES = (
    "data",
    "micro_batch",
    "gradient_checkpointing",
    "cache_gb",
    "trackers",
    "output",
    "save_steps",
    "loaders",
)
"""Settings that a resumed run may change."""

Rate = Annotated[float, Between(0, 1)]
Decay = Annotated[float, Between(0, 10)]
Clip = Annotated[float, Between(0, 1e6)]
Epochs = Annotated[float, Between(0, 1000)]


@settings
class SftSettings:
    """Supervised training."""

    learning_rate: Rate = 1e-5
    """Peak."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Of the learning rate after the warm-up."""
    warmup: Share = 0.03
    """Share of the steps with a rising learning rate."""
    batch: Count = 64
    """Images per optimiser step."""
    micro_batch: Count = 4
    """Images per forward pass."""
    questions: Count = 4
    """Most questions about one image that are packed into one sequence; each attends to the image and itself alone."""
    epochs: Epochs = 1.0
    """Passes over the data; `steps` above 0 overrides it."""
    steps: CountOrNone = 0
    """Optimiser steps."""
    weight_decay: Decay = 0.01
    """Of all weights but biases and norms; with Muon, of its matrices alone."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of AdamW."""
    clip: Clip = 1.0
    """Largest gradient norm."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon updates the matrices and leaves the rest to AdamW, at one rate."""

    def __post_init__(self) -> None:
        _check_divides(self.batch, self.micro_batch)


@settings
class GrpoSettings:
    """Reinforcement: several answers per question; those better than their group's mean become more likely."""

    learning_rate: Rate = 1e-6
    """Constant."""
    batch: Count = 96
    """Questions per optimiser step; each gets `group` answers."""
    micro_batch: Count = 8
    """Answers per forward pass."""
    group: Annotated[int, Between(2)] = 8
    """Answers per question."""
    epochs: Epochs = 1.0
    """Passes over the data; `steps` above 0 overrides it."""
    steps: CountOrNone = 0
    """Optimiser steps."""
    clip_low: Share = 0.2
    """The probability ratio is clipped at 1 minus this,"""
    clip_high: Annotated[float, Between(0, 10)] = 0.3
    """and at 1 plus this."""
    dual_clip: Annotated[float, Between(1, 100)] = 3.0
    """Largest ratio if the advantage is negative."""
    temperature: Annotated[float, Between(1e-3, 10)] = 1.0
    """Of the sampled answers."""
    max_new_tokens: Count = 2048
    """Maximum number of tokens of an answer."""
    format_weight: Share = 0.0
    """Share of the reward for a well-formed answer."""
    counting: bool = False
    """Reward counts by relative error instead of all or nothing."""
    weight_decay: Decay = 0.01
    """Of AdamW."""
    clip: Clip = 1.0
    """Largest gradient norm."""
    judge: EndpointSettings | None = None
    """A language model for free answers that rules cannot decide; null counts them as wrong."""
    judge_budget: CountOrNone = 100_000
    """Most requests of a run to the judge; 0 for no limit."""

    def __post_init__(self) -> None:
        _check_divides(self.batch * self.group, self.micro_batch)


@settings
class AttentionSupervision:
    """Attention heads learn to attend to the region while the answer is written; supervised training only."""

    weight: Annotated[float, Between(0, 100)] = 0.0
    """Of this loss beside the answers' loss; 0 turns it off."""
    layer: CountOrNone = 0
    """Of the decoder."""
    heads: Annotated[tuple[CountOrNone, ...], Field(min_length=1)] = (0,)
    """Of that layer."""


@settings
class StudentRecipe:
    """One run of `qzoom train student`."""

    base: Text
    """Hub id, folder or "tiny": the student before training."""
    data: str = ""
    """Folder that `qzoom distill` exported to."""
    output: str = ""
    """Where to write if the command line does not say."""
    method: Literal["sft", "grpo", "sft+grpo"] = "grpo"
    """The phases: supervised training on the agreed answers, GRPO with a reward by rules, or one after the other."""
    tokens: tuple[Count, ...] = ()
    """Most visual tokens of the full view, one drawn per step; empty takes what `qzoom ask --zoom never` takes."""
    styles: dict[str, Annotated[float, Between(0, 1e6)]] = field(default_factory=lambda: {"rectangle": 1.0})
    """How the region is marked, by weight: rectangle, ellipse, dim, text, none."""
    fade: ShareSchedule = field(default_factory=lambda: ShareSchedule(1.0, 1.0, "constant"))
    """Share of samples with a marked region over the training: first, last, shape, until."""
    clause: bool = True
    """Add the sentence that points to the marked region."""
    attention_supervision: AttentionSupervision = field(default_factory=AttentionSupervision)
    """Attention heads that learn to attend to the region, marked or not."""
    instruction: str = ""
    """Added to every question, in training and validation alike."""
    answer_form: Literal["plain", "tags"] = "plain"
    """The answer alone, or in answer tags."""
    longest_plain: Count = 300
    """Characters up to which a reply without tags counts as the answer."""
    negatives: Annotated[float, Between(0, 0.95)] | None = None
    """Share of questions whose target is absent; null keeps the data's own."""
    rehearsal: Annotated[float, Between(0, 0.95)] = 0.0
    """Share of freshly drawn images with questions of their own, against forgetting."""
    lora_rank: CountOrNone = 0
    """0 trains all weights; above 0, LoRA of this rank, merged at the end."""
    vision: bool = True
    """Train the vision tower too."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What is computed in."""
    gradient_checkpointing: bool = True
    """Recompute layers in the backward pass."""
    cache_gb: Annotated[float, Between(0, 1e5)] = 0.0
    """Memory for resized images, in GB (10^9 bytes) per loading process."""
    validation: Annotated[float, Between(0, 0.9)] = 0.05
    """Share of the images held out if the data have no split of their own."""
    validation_items: Count = 400
    """Most questions of a validation."""
    validation_tokens: CountOrNone = 0
    """Visual tokens of the validated view; 0 takes what `qzoom ask --zoom never` takes."""
    validation_steps: Count = 50
    """Optimiser steps between validations."""
    max_new_tokens: Count = 64
    """Longest validated answer."""
    save_steps: Count = 50
    """Optimiser steps between checkpoints."""
    seed: CountOrNone = 0
    """Of order, boxes, rehearsal and sampling."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the metrics of every step also go: tensorboard (event files in the run's folder), wandb, mlflow; [] for
    none."""
    sft: SftSettings = field(default_factory=SftSettings)
    """Supervised training."""
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    """Reinforcement."""
    keep: Literal["best", "last"] = "best"
    """Weights of the best validation, or of the last: a small validation is a noisy judge of a schedule that lowers the
    learning rate at its end."""
    random_crops: RandomCrops = field(default_factory=RandomCrops)
    """Random crops that some steps of supervised training show instead of whole images."""
    loaders: CountOrNone = 0
    """Processes that prepare batches of supervised training ahead."""

    def __post_init__(self) -> None:
        for style in self.styles:
            if style not in STYLES:
                raise ConfigError(f"styles must be one of {', '.join(STYLES)}, not {style!r}.")
        if sum(self.styles.values()) <= 0:
            raise ConfigError("styles need a weight above 0.")

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of the method, in order: "sft", "grpo"."""
        return tuple(self.method.split("+"))

    def decisive(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as JSON values."""
        return without(to_dict(self), RESUMABLE_CHANGES)


def _check_divides(whole: int, micro_batch: int) -> None:
    if whole % micro_batch:
        raise ConfigError(
            f"a step of {whole} cannot be cut into forwards of {micro_batch}; choose a divisor as micro_batch."
        )
