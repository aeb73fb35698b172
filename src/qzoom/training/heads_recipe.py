"""Settings of head training: how labels are made from the model's own answers, and how the two branches are fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qzoom.config import from_mapping, read_yaml
from qzoom.errors import ConfigError

__all__ = ["HeadsRecipe", "load_heads_recipe"]


@dataclass(frozen=True, slots=True)
class HeadsRecipe:
    """One run from a base model to an adapter.

    Args:
        base: folder or id of the base model.
        receipts: folder of a receipts data set whose train split joins the synthetic pictures; empty for none.
        seed: of pictures, sampling and weights.
        shared_layers: K.
        branch_layers: T.
        documents: synthetic documents to label for the region branch.
        scenes: synthetic scenes, likewise.
        receipt_pictures: most receipts, likewise.
        questions: most questions per picture.
        teacher_tokens: visual tokens of the look whose answer and attention make the labels.
        student_tokens: budgets of the coarse looks that the branches learn on, in turn.
        heads: (layer, head) pairs whose attention is taken; empty finds them on known boxes.
        head_count: how many heads to take when they are found.
        probe_pictures: synthetic pictures on which heads are ranked.
        known_boxes: kinds ("document", "scene") whose label maps come from the known answer boxes instead of attention.
        foreground: tau_fg.
        background: tau_bg.
        sink_ratio: a cell is a sink when its hidden state's norm exceeds this many medians.
        ladder: visual tokens of the resolution ladder for gate labels, rising.
        gate_labels: "ladder" (method.md 8), or "zoom": the coarse answer against the zoomed one (`heads_zoom`).
        gate_pictures: pictures climbed for gate labels.
        zoom_pictures: drawn pictures asked both ways for gate labels.
        steps: optimiser steps of the region branch.
        gate_steps: optimiser steps of the gate.
        batch: questions per step.
        learning_rate: peak of the cosine schedule.
        region_threshold: stored in the config; relative to the map's peak.
        gate_threshold: stored in the config.
    """

    base: str
    receipts: str = ""
    seed: int = 7
    shared_layers: int = 3
    branch_layers: int = 2
    documents: int = 1200
    scenes: int = 500
    receipt_pictures: int = 246
    questions: int = 4
    teacher_tokens: int = 512
    student_tokens: tuple[int, ...] = (64, 100, 144)
    heads: tuple[tuple[int, int], ...] = ()
    head_count: int = 3
    probe_pictures: int = 60
    known_boxes: tuple[str, ...] = ()
    foreground: float = 0.25
    background: float = 0.05
    sink_ratio: float = 3.0
    ladder: tuple[int, ...] = (64, 144, 288, 512, 1024)
    gate_labels: Literal["ladder", "zoom"] = "ladder"
    gate_pictures: int = 600
    zoom_pictures: int = 0
    steps: int = 1500
    gate_steps: int = 600
    batch: int = 32
    learning_rate: float = 1e-3
    region_threshold: float = 0.3
    gate_threshold: float = 0.3

    def __post_init__(self) -> None:
        for name in ("student_tokens", "ladder"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "known_boxes", tuple(self.known_boxes))
        if not set(self.known_boxes) <= {"document", "scene"}:
            raise ConfigError(f"known_boxes may name document and scene, not {', '.join(self.known_boxes)}.")
        object.__setattr__(self, "heads", tuple((int(a), int(b)) for a, b in self.heads))
        if self.gate_labels not in ("ladder", "zoom"):
            raise ConfigError(f"gate_labels must be ladder or zoom, not {self.gate_labels!r}.")
        if not self.student_tokens or min(self.student_tokens) < 4:
            raise ConfigError("student_tokens needs at least one budget of 4 or more visual tokens.")
        if len(self.ladder) < 3 or list(self.ladder) != sorted(set(self.ladder)):
            raise ConfigError("ladder needs at least three rising visual-token budgets.")
        for name in ("steps", "gate_steps", "batch", "questions", "head_count", "probe_pictures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")


def load_heads_recipe(path: Path) -> HeadsRecipe:
    """Read a YAML recipe.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown key or a bad value.
    """
    values = read_yaml(path)
    return from_mapping(HeadsRecipe, values, str(path))
