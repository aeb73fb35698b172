"""Gates without training: zoom when the first token of the coarse answer is not sure.

The coarse look is read to its end first, which the trained gate does not need: a zoom pays for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qzoom.engine.batch import prefill
from qzoom.engine.perceive import propose
from qzoom.engine.request import check_heads
from qzoom.errors import ConfigError
from qzoom.evaluation.methods.base import Budget, MethodAnswer, start
from qzoom.types import GateDecision

if TYPE_CHECKING:
    from torch import Tensor

    from qzoom.config import ZoomConfig
    from qzoom.data.samples import EvalQuestion
    from qzoom.model import QZoom

__all__ = ["ENTROPY", "MARGIN", "ConfidenceGate", "calibrated_threshold", "entropy_doubt", "margin_doubt"]


def margin_doubt(logits: Tensor) -> float:
    """One less the distance between the two most likely tokens' probabilities: 0 is sure, 1 is a tie.

    Args:
        logits: (vocabulary,) of the first token.
    """
    first, second = logits.float().softmax(-1).topk(2).values.tolist()
    return float(1 - (first - second))


def entropy_doubt(logits: Tensor) -> float:
    """One less the inverse of the perplexity, exp(-entropy): 0 is sure, 0.5 like two equal tokens, 0.75 like four.

    Args:
        logits: (vocabulary,) of the first token.
    """
    logs = logits.float().log_softmax(-1)
    return float(1 - (logs.exp() * logs).nan_to_num(0.0).sum().exp())


def calibrated_threshold(config: ZoomConfig, name: str) -> float | None:
    """What `qzoom calibrate --confidence-gates` chose for a gate; None for a model that was not calibrated so.

    Raises:
        ConfigError: the config holds something else in its place.
    """
    found: Any = config.provenance
    for key in ("calibration", "confidence_gates", name, "threshold"):
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
        raise ConfigError(
            f"The model's provenance gives {name} the threshold {found!r}, which is no number from 0 to 1; calibrate "
            "the model again."
        )
    return float(found)


@dataclass(frozen=True, slots=True)
class ConfidenceGate:
    """The region branch behind a gate by the answer's confidence; see `Method`.

    Args:
        name: of the method.
        doubt: from the first token's logits to a score in [0, 1], higher for less sure.
        threshold: zoom at this score, unless the budget has a gate threshold or the model was calibrated for this gate.
    """

    name: str
    doubt: Callable[[Tensor], float]
    threshold: float

    @property
    def zooms(self) -> bool:
        """Yes."""
        return True

    @property
    def needs_region(self) -> bool:
        """Yes: only the gate is replaced."""
        return True

    @property
    def asks_gate(self) -> bool:
        """No."""
        return False

    def answer(self, model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> MethodAnswer:
        """See `Method.answer`."""
        check_heads(model.engine, "auto")
        reading = start(model, images, question, budget)
        threshold = budget.gate_threshold
        if threshold is None:
            threshold = calibrated_threshold(model.config, self.name)
        if threshold is None:
            threshold = self.threshold
        row = prefill(model.engine, [reading.look], reading.clock)[0]
        score = min(1.0, max(0.0, self.doubt(row.logits)))
        gate = GateDecision(score, threshold, score >= threshold)
        if not gate.zoomed:
            return reading.coarse(gate, row)
        with reading.clock.step("region"):
            found = propose(model.engine, [dataclasses.replace(reading.look, gate=gate)])[0]
        if not found.boxes:
            return reading.coarse(found.gate, row)
        reading.extra["prompt_tokens"] = len(reading.look.state.prompt)
        return reading.zoomed(found.boxes, gate)


MARGIN = ConfidenceGate("margin", margin_doubt, 0.5)
ENTROPY = ConfidenceGate("entropy", entropy_doubt, 0.5)
