"""Training-free gates: zoom if the first token of the coarse answer has low confidence.

They require the full coarse prefill before the decision, which the trained gate does not, so a zoom costs more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from qzoom.config import ZoomConfig
from qzoom.data.samples import SampleQuestion
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import propose
from qzoom.engine.request import Options, check_heads
from qzoom.errors import ConfigError
from qzoom.evaluation.methods.base import Answered, Method, start
from qzoom.model import QZoom
from qzoom.types import GateDecision


def margin_doubt(logits: Tensor) -> float:
    """One less the distance between the two most likely tokens' probabilities: 0 is sure, 1 is a tie. `logits`:
    (vocabulary,) of the first token."""
    first, second = logits.float().softmax(-1).topk(2).values.tolist()
    return float(1 - (first - second))


def entropy_doubt(logits: Tensor) -> float:
    """One less the inverse of the perplexity, exp(-entropy): 0 is sure, 0.5 like two equal tokens, 0.75 like four.
    `logits`: (vocabulary,) of the first token."""
    logs = logits.float().log_softmax(-1)
    return float(1 - (logs.exp() * logs).nan_to_num(0.0).sum().exp())


def calibrated_threshold(config: ZoomConfig, name: str) -> float | None:
    """What `qzoom calibrate --confidence-gates` chose for a gate; None for a model that was not calibrated so
    (ConfigError: the config holds something else in its place)."""
    value: Any = config.provenance
    for key in ("calibration", "confidence_gates", name, "threshold"):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(
            f"The model's provenance gives {name} the threshold {value!r}, which is no number from 0 to 1; calibrate "
            "the model again."
        )
    return float(value)


def zoom_by_doubt(
    model: QZoom,
    images: Any,
    question: SampleQuestion,
    options: Options,
    *,
    name: str,
    doubt: Callable[[Tensor], float],
) -> Answered:
    """The region branch behind a gate by the answer's confidence; see `Method.answer`.

    It zooms from the options' gate threshold, else from the one that the model was calibrated to, else from 0.5.

    Args:
        name: of the gate, for its calibrated threshold.
        doubt: from the first token's logits to a score in [0, 1], higher for less sure.
    """
    check_heads(model.engine, "always")
    reading = start(model, images, question, options)
    threshold = options.gate_threshold
    if threshold is None:
        threshold = calibrated_threshold(model.config, name)
    if threshold is None:
        threshold = 0.5
    row = prefill(model.engine, [reading.coarse], reading.clock)[0]
    score = min(1.0, max(0.0, doubt(row.logits)))
    gate = GateDecision(score, threshold, score >= threshold)
    if not gate.zoomed:
        return reading.answer_coarse(gate, row)
    proposed = propose(model.engine, [dataclasses.replace(reading.coarse, gate=gate)], reading.clock)[0]
    if not proposed.boxes:
        return reading.answer_coarse(proposed.gate, row)
    reading.extra["upper_tokens"] = len(reading.coarse.state.prompt)
    return reading.answer_zoomed(proposed.boxes, gate)


MARGIN, ENTROPY = (
    Method(name, functools.partial(zoom_by_doubt, name=name, doubt=doubt), needs_region=True)
    for name, doubt in (("margin", margin_doubt), ("entropy", entropy_doubt))
)
