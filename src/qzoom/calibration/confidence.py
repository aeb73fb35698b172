"""Thresholds of the gates by the answer's confidence, so that they zoom as often as the trained gate does.

Gates can only be compared at the same share of zooms. Each question's doubt is known after one token of its coarse
answer; whether a zoom finds a region has been measured already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom.calibration.points import Sample, Wish, choose
from qzoom.errors import DataError

if TYPE_CHECKING:
    from qzoom.config import TokenBudget
    from qzoom.evaluation.records import AnswerRow, Task
    from qzoom.model import QZoom

__all__ = ["GATES", "confidence_thresholds", "threshold_for"]

GATES = ("margin", "entropy")
"""Names in `qzoom.evaluation.baselines.METHODS`."""


def confidence_thresholds(
    model: QZoom,
    questions: Task,
    always: Sequence[AnswerRow],
    share: float,
    *,
    coarse: TokenBudget | None = None,
    keep: Path | None = None,
    on_picture: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """For each of `GATES` its threshold and the share of the questions that zooms from it.

    Args:
        model: the model.
        questions: those that `always` answers.
        always: the same questions, zoomed whatever the gate says.
        share: of the questions that the trained gate zooms.
        coarse: limits of the coarse look.
        keep: folder of the answers.
        on_picture: told (gate, pictures done, pictures in all).

    Raises:
        DataError: not one question could be asked.
    """
    from qzoom.evaluation.runner import EvalOptions, run

    out = {}
    for name in GATES:
        options = EvalOptions("auto", coarse, None, gate_threshold=1.0, max_new_tokens=1, method=name)
        told = None if on_picture is None else lambda done, total, gate=name: on_picture(gate, done, total)
        rows = run(model, questions, options, output=keep and keep / f"{name}.jsonl", on_picture=told)
        out[name] = threshold_for(rows, always, share)
    return out


def threshold_for(rows: Sequence[AnswerRow], always: Sequence[AnswerRow], share: float) -> dict[str, float]:
    """The threshold whose share of zooms is nearest to a wanted one, and that share.

    Args:
        rows: with the gate's score of every question.
        always: the same questions, zoomed where a region was found.
        share: wanted.

    Raises:
        DataError: no question with both.
    """
    samples = [
        Sample(said.gate.score, zoomed.gate.zoomed, harmed=False, gained=False, coarse_s=0.0, zoomed_s=0.0)
        for said, zoomed in zip(rows, always, strict=True)
        if not said.error and not zoomed.error and said.gate and zoomed.gate and said.gate.score is not None
    ]
    if not samples:
        raise DataError("There is not one question with a confidence, so no threshold can be chosen.")
    point = choose(samples, Wish(share_zoomed=share))
    return {"threshold": point.threshold, "share_zoomed": round(point.share_zoomed, 6)}
