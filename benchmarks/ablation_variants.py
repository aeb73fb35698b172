"""The ablations of issue 3 as data: what each variant changes, and what the paper found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REFERENCE = "reference"
THRESHOLDS = (0.3, 0.45, 0.6, 0.75)
STRATEGIES = ("consistency", "prediction_vs_gt")
DECISIONS = ("map", "answer")
"""What may decide in the gate's place, see `ZoomConfig.decide_by`; compared with the gates of both kinds of labels."""
GATES = "gates"


@dataclass(frozen=True, slots=True)
class Variant:
    """One change against the reference.

    Args:
        name: of its folder.
        title: what is different, for the table.
        group: the question that it belongs to.
        labels: name of its label maps.
        recipe: changed settings of the training; None trains nothing and looks with the reference's branches.
        zoom: changed `ZoomConfig` fields when answering.
        answers: also train the decoder (stage 2) on what the reference's zooming gets wrong.
        checks: whether the paper's claim of its group is about this change.
    """

    name: str
    title: str
    group: str
    labels: str = "own"
    recipe: dict[str, Any] | None = field(default_factory=dict)
    zoom: dict[str, Any] = field(default_factory=dict)
    answers: bool = False
    checks: bool = True

    @property
    def trains(self) -> bool:
        """Whether it has a region branch of its own."""
        return self.recipe is not None


@dataclass(frozen=True, slots=True)
class Group:
    """One question of the ablations.

    Args:
        title: as a heading.
        paper: what the authors report.
        better: how the reference stands to the variants in the paper: "higher", "lower", or "" where it does not say.
    """

    title: str
    paper: str
    better: str = "higher"


GROUPS = {
    "labels": Group(
        "Tri-state against two-state labels",
        "7B, mean of three sets: 82.7 with cells left open (0.20/0.05), 81.8 without (0.10/0.10); LLaVA-7B 55.6, 52.6",
    ),
    "sinks": Group(
        "Sink removal",
        "LLaVA-7B, mean of four sets: 62.4 with sinks taken out of the labels, 61.4 without",
    ),
    "responses": Group(
        "Own responses against ground truth",
        "LLaVA-7B: 62.6 with its own responses, 60.7 with the known ones; 7B: 78.9 with own labels, 78.0 with 68K "
        "known boxes",
    ),
    "amount": Group(
        "Amount of labels",
        "7B, mean of seven sets: 77.7 with 10K, 78.2 with 25K, 78.1 with 50K, 78.4 with 100K, 78.9 with 185K",
    ),
    "shared": Group(
        "K, the shared layers",
        "7B (28 layers, T = 3), mean of seven sets: K = 3 72.8, 9 74.4, 15 76.5, 18 78.9, 21 77.4",
        "",
    ),
    "depth": Group(
        "T, the branch's layers",
        "7B (K = 18): T = 1 76.2, 2 78.4, 3 78.9, 4 77.5",
        "",
    ),
    "positions": Group(
        "Aligned positions",
        "no figure of their own; the authors align positions in stage 2 only",
        "",
    ),
    "answers": Group(
        "Stage 2",
        "7B: +0.6 documents, +0.6 high resolution; 4B: +1.4 and +3.1",
        "lower",
    ),
    "boxes": Group(
        "One box against components",
        "no figure: one box around everything; the successor takes components of a map relative to its peak",
        "",
    ),
    "sparse": Group(
        "Sparse crops",
        "no figure of their own: the successor reads only the foreground of a crop enlarged by up to 3",
        "",
    ),
}

VARIANTS = (
    Variant(REFERENCE, "tri-state labels of its own answers, K = 3, T = 2, peak's component", ""),
    Variant("two-state-010", "one threshold at 0.10 of the peak, nothing left open", "labels", "two-state-010"),
    Variant("two-state-025", "one threshold at 0.25, nothing left open", "labels", "two-state-025"),
    Variant("sinks-kept", "sinks stay in the label maps", "sinks", "sinks-kept"),
    Variant(
        "sinks-first-token",
        "first-token sinks also masked when answering",
        "sinks",
        recipe=None,
        zoom={"sink": "first_token"},
        checks=False,
    ),
    Variant("known-answers", "attention of the known answers", "responses", "known-answers"),
    Variant("known-boxes", "known boxes instead of attention", "responses", "known-boxes"),
    Variant("few-labels", "one map in sixteen", "amount", "few"),
    Variant("some-labels", "one map in four", "amount", "some"),
    Variant("K2", "K = 2", "shared", recipe={"shared_layers": 2}),
    Variant("K4", "K = 4", "shared", recipe={"shared_layers": 4}),
    Variant("T1", "T = 1", "depth", recipe={"branch_layers": 1}),
    Variant("T3", "T = 3", "depth", recipe={"branch_layers": 3}),
    Variant("aligned", "aligned positions, never trained", "positions", recipe=None, zoom={"positions": "aligned"}),
    Variant(
        "stage-2",
        "after stage 2, aligned positions",
        "answers",
        recipe=None,
        zoom={"positions": "aligned"},
        answers=True,
    ),
    Variant(
        "union",
        "one box around all foreground",
        "boxes",
        recipe=None,
        zoom={"box": {"components": "union"}},
    ),
    Variant(
        "components",
        "up to three components share the tokens",
        "boxes",
        recipe=None,
        zoom={"box": {"components": "all", "max_regions": 3}},
    ),
    Variant(
        "six",
        "up to six components share the tokens by area",
        "boxes",
        recipe=None,
        zoom={"box": {"components": "all", "max_regions": 6}},
    ),
    Variant(
        "six-equal",
        "up to six components share the tokens equally",
        "boxes",
        recipe=None,
        zoom={"box": {"components": "all", "max_regions": 6, "shares": "equal"}},
    ),
    Variant("sparse", "only the foreground of the enlarged box", "sparse", recipe=None, zoom={"box": {"sparse": 3.0}}),
    Variant(
        "sparse-union",
        "the same of one box around all foreground",
        "sparse",
        recipe=None,
        zoom={"box": {"sparse": 3.0, "components": "union"}},
    ),
)


def chosen(names: list[str] | None) -> tuple[Variant, ...]:
    """The variants of some names, the reference first; all of them without names."""
    return tuple(v for v in VARIANTS if names is None or v.name in (REFERENCE, *names))
