"""The model's own ways to look: what its gate decides, the coarse look alone, the region always."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qzoom.engine.session import Session
from qzoom.evaluation.baselines.base import Budget, MethodAnswer, answer_of
from qzoom.types import ZoomMode

if TYPE_CHECKING:
    from qzoom.evaluation.records import EvalQuestion
    from qzoom.model import QZoom

__all__ = ["ALWAYS", "PLAIN", "QZOOM", "OwnWay"]


@dataclass(frozen=True, slots=True)
class OwnWay:
    """The engine as it is; see `Method`.

    Args:
        name: of the method.
        zoom: how it looks; None takes the budget's.
    """

    name: str
    zoom: ZoomMode | None

    @property
    def zooms(self) -> bool:
        """All but the plain model."""
        return self.zoom != "never"

    @property
    def needs_region(self) -> bool:
        """All but the plain model."""
        return self.zooms

    @property
    def asks_gate(self) -> bool:
        """Only where the budget leaves the choice."""
        return self.zoom is None

    def answer(self, model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> MethodAnswer:
        """See `Method.answer`."""
        options = budget.of_question(self.zoom or budget.zoom)
        start = time.perf_counter()
        if isinstance(images, Session):
            said = images.ask(question.question, **options)
        else:
            said = model.ask(images, question.question, coarse_tokens=budget.coarse, **options)
        return answer_of(said, time.perf_counter() - start)


QZOOM = OwnWay("qzoom", None)
PLAIN = OwnWay("plain", "never")
ALWAYS = OwnWay("always", "always")
