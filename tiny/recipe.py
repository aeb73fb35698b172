"""The recipe of the embedded model: one checked YAML file with everything that determines its weights.

A recipe holds the architecture, the optimiser's numbers, the packs to draw from and a list of stages; a stage says how
many minutes to train and which exercises to mix. Minutes are the process's own CPU time (on a GPU: of the clock), so
a run that shares its core with others is as long as any other.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from qzoom.errors import ConfigError
from qzoom.settings import Between, Positive, Share, closest, read_settings, settings
from tiny.aux_losses import GuideWeights
from tiny.curriculum import EXERCISES
from tiny.model import TinyArchitecture

Count = Annotated[int, Between(1)]
NotNegative = Annotated[float, Between(0)]


@settings
class Stage:
    """Part of a training."""

    name: str
    """Name of the stage in the curve."""
    minutes: Positive
    """Minutes of training."""
    mix: dict[str, float]
    """Shares of the work by exercise."""
    lr_start: NotNegative = 1.0
    """Factor of the learning rates at its beginning; in between it changes linearly."""
    lr_end: NotNegative = 1.0
    """Factor of the learning rates at its end."""
    decoder_lr: NotNegative = 1.0
    """Factor on top for the decoder: Muon's updates are as large for the few questions of a stage that mostly trains
    the tower as for many, and would undo what the decoder knows."""

    def __post_init__(self) -> None:
        if not self.mix or min(self.mix.values()) <= 0:
            raise ConfigError(f"Stage `{self.name}` needs at least one exercise in `mix`, each with a share above 0.")
        for name in self.mix:
            if name not in EXERCISES:
                raise ConfigError(
                    f"Stage `{self.name}` mixes the unknown exercise `{name}`; {closest(name, EXERCISES)}"
                )


@settings
class PackCounts:
    """How many pages are drawn into the packs."""

    sheets: Count = 2500
    """Sheets of unrelated printed lines."""
    documents: Count = 1500
    """Receipts, forms and tables."""
    scenes: Count = 300
    """Scenes of tagged objects."""
    held_out: Count = 60
    """Pages of each kind that are only measured with."""
    seed: Annotated[int, Between(0)] = 1
    """Decides all pages."""


@settings
class Recipe:
    """An embedded model."""

    stages: tuple[Stage, ...]
    """What to train, in order."""
    packs: str = "runs/packs"
    """Folder of the packed pages."""
    pack_counts: PackCounts = field(default_factory=PackCounts)
    """How many pages to draw."""
    receipts: str | None = None
    """Folder of the scanned receipts, for exercises that begin with `real`; null takes the one that QZOOM_RECEIPTS
    names."""
    proposals: str | None = None
    """Folder of the boxes that `train.py propose` drew; `*_pair` exercises take part of their crops there. None takes
    all of them around known places."""
    exchanged_receipts: Share = 0.0
    """Share of the real receipts whose values change places before a view is cut (`exchange.py`)."""
    respelled_receipts: Share = 0.0
    """Share of the real receipts whose letters change places: those of all lines where lines are read, those of the
    company elsewhere (`respell.py`)."""
    start_from: str | None = None
    """Folder of an exported model to go on from; its guides are learned anew. None starts from scratch."""
    guide_steps: Annotated[int, Between(0)] = 60
    """Steps during which the guides learn from such a model's tower without teaching it."""
    seed: Annotated[int, Between(0)] = 0
    """Decides the first weights and all examples."""
    architecture: TinyArchitecture = field(default_factory=TinyArchitecture)
    """Sizes of the model."""
    vocabulary_size: Annotated[int, Between(264)] = 640
    """Most entries of the tokenizer."""
    step_positions: Count = 12_000
    """Sequence positions of one optimiser step, about."""
    batch_positions: Count = 2048
    """Sequence positions of one forward pass, about."""
    muon_lr: Positive = 8e-3
    """Learning rate of the matrices inside the towers."""
    adamw_lr: Positive = 3e-3
    """Learning rate of everything else."""
    weight_decay: NotNegative = 0.01
    """Decay of the matrices."""
    clip_norm: Positive = 1.0
    """Largest norm of a step's gradient."""
    warmup_steps: Count = 50
    """Steps over which the learning rates rise."""
    glyph_weight: NotNegative = 0.5
    """Weight of naming the characters of drawn pages, beside the answer loss."""
    line_weight: NotNegative = 0.5
    """Weight of reading transcribed lines with CTC."""
    object_weight: NotNegative = 0.5
    """Weight of naming colour and shape of objects."""
    pointing_weight: NotNegative = 0.3
    """Weight of looking at the next answer character."""
    pointing_layer: Annotated[int, Between(0)] = 4
    """Decoder layer that learns to look."""
    pointing_heads: tuple[int, int] = (0, 2)
    """Its heads that do: at the first view that shows the character, and at the last."""
    matching_weight: NotNegative = 0.0
    """Weight of looking, at the question's words, at where they are printed beside or above the answer."""
    matching_layer: Annotated[int, Between(0)] = 2
    """Decoder layer that learns to."""
    matching_heads: tuple[int, int] = (0, 2)
    """Its heads that do."""
    bf16: bool = True
    """Whether the working copy of the weights is bfloat16; the optimiser's is float32 always."""
    checkpoint_minutes: Positive = 3.0
    """Minutes between two saved states."""
    evaluate_minutes: Positive = 10.0
    """Minutes between two measurements."""
    export_minutes: Positive = 10.0
    """Minutes between two exports of the model."""
    evaluate_examples: Count = 48
    """Held-out examples an exercise is measured with."""
    evaluate: tuple[str, ...] = ()
    """Exercises to measure."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("A recipe needs at least one stage in `stages`.")
        for name in self.evaluate:
            if name not in EXERCISES:
                raise ConfigError(f"`evaluate` names the unknown exercise `{name}`; {closest(name, EXERCISES)}")

    @property
    def minutes(self) -> float:
        """Minutes of all stages together."""
        return sum(stage.minutes for stage in self.stages)

    @property
    def guide_weights(self) -> GuideWeights:
        """The guides' weights as the model takes them."""
        return GuideWeights(
            self.glyph_weight,
            self.line_weight,
            self.object_weight,
            self.pointing_weight,
            self.pointing_layer,
            self.pointing_heads,
            self.matching_weight,
            self.matching_layer,
            self.matching_heads,
        )

    @property
    def exercises(self) -> set[str]:
        """All exercises of all stages and of the measuring."""
        return {name for stage in self.stages for name in stage.mix} | set(self.evaluate)

    def at(self, minutes: float) -> tuple[Stage, float]:
        """The stage after this many minutes and its learning-rate factor."""
        begin = 0.0
        for stage in self.stages:
            if minutes < begin + stage.minutes:
                share = (minutes - begin) / stage.minutes
                return stage, stage.lr_start + (stage.lr_end - stage.lr_start) * share
            begin += stage.minutes
        return self.stages[-1], self.stages[-1].lr_end


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; every mistake is a `ConfigError` that names the key."""
    try:
        return read_settings(Recipe, path)
    except ConfigError as error:
        sentence = str(error)
        raise ConfigError(sentence if str(path) in sentence else f"{path}: {sentence}") from None
