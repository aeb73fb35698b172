"""What every way of looking has in common: what it may spend, what it gives back, and how it is called.

All methods get the same pictures, the same question text and the same limits; only how they look differs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qzoom.config import TokenBudget
from qzoom.types import Answer, GateDecision, Region, Usage, ZoomMode

if TYPE_CHECKING:
    from qzoom.evaluation.records import EvalQuestion
    from qzoom.model import QZoom

__all__ = ["Budget", "Method", "MethodAnswer", "answer_of", "with_needed_branches"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What one answer may spend.

    Args:
        coarse: limits of the coarse look; None for the model's own. A session's own coarse look wins.
        region: limits of all regions together; None for the model's own.
        max_new_tokens: most tokens of the answer.
        gate_threshold: zoom at this score; None for the method's own.
        region_threshold: see `ZoomConfig.region_threshold`; None for the checkpoint's.
        zoom: what "qzoom" does; the other methods have it in their name.
    """

    coarse: TokenBudget | None = None
    region: TokenBudget | None = None
    max_new_tokens: int = 128
    gate_threshold: float | None = None
    region_threshold: float | None = None
    zoom: ZoomMode = "auto"

    def of_question(self, zoom: ZoomMode) -> dict[str, Any]:
        """Keyword arguments of `Session.ask` and, the coarse look aside, of `QZoom.ask`."""
        return {
            "zoom": zoom,
            "region_tokens": self.region,
            "gate_threshold": self.gate_threshold,
            "region_threshold": self.region_threshold,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True, slots=True)
class MethodAnswer:
    """One question as a method answered it.

    Args:
        text: the answer.
        finish_reason: see `qzoom.types.Answer`.
        gate: what was decided and by which score; `note` says why nothing was read where that was wanted.
        regions: what was read at high resolution.
        usage: tokens of the prompt that was answered.
        seconds: wall-clock time of everything that the method did.
        timing_ms: milliseconds per step.
        extra: what came on top of one prompt and its answer, by name: "prompt_tokens" and "completion_tokens" of
            further rounds, "failures" (1 when a round gave nothing to use).
    """

    text: str
    finish_reason: str
    gate: GateDecision
    regions: tuple[Region, ...]
    usage: Usage
    seconds: float
    timing_ms: dict[str, float]
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens paid, both looks."""
        return self.usage.coarse_tokens + self.usage.region_tokens

    def row_fields(self) -> dict[str, Any]:
        """The same as fields of `qzoom.evaluation.records.AnswerRow`, time and `extra` aside."""
        return {
            "prediction": self.text,
            "finish_reason": self.finish_reason,
            "gate": self.gate,
            "regions": self.regions,
            "usage": self.usage,
            "timing_ms": {name: round(ms, 2) for name, ms in self.timing_ms.items()},
        }


class Method(Protocol):
    """A way to look and answer. One object may be used for any number of questions; it keeps nothing of them."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def zooms(self) -> bool:
        """Whether it reads regions, so that a total of visual tokens must be shared between two looks."""

    @property
    def needs_region(self) -> bool:
        """Whether the model must have a region branch."""

    @property
    def asks_gate(self) -> bool:
        """Whether the model's gate decides, where the zoom is "auto"."""

    def answer(self, model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> MethodAnswer:
        """Answer one question.

        Args:
            model: the model under test.
            images: pictures as `QZoom.ask` takes them, or a `Session` over them, whose coarse look is shared by all
                its questions.
            question: what to ask; its right answer is never read, its boxes only by the oracle.
            budget: what may be spent.

        Raises:
            QZoomError: the question cannot be asked.
        """


def with_needed_branches(model: QZoom, method: Method, zoom: ZoomMode) -> QZoom:
    """The model with those branches alone that a method uses, so that a session over a picture pays for no others.

    Args:
        model: the model under test; it is not changed.
        method: which way of looking.
        zoom: what "qzoom" does; "never" uses no branch at all, whatever the method.
    """
    from qzoom.model import QZoom

    own = model.engine
    gate = own.gate if method.asks_gate and zoom == "auto" else None
    region = own.region if method.needs_region and zoom != "never" else None
    if gate is own.gate and region is own.region:
        return model
    return QZoom(dataclasses.replace(own, gate=gate, region=region), model.name, model.image_limits)


def answer_of(said: Answer, seconds: float, extra: dict[str, float] | None = None) -> MethodAnswer:
    """The engine's answer as a method's."""
    return MethodAnswer(
        said.text, said.finish_reason, said.gate, said.regions, said.usage, seconds, said.timing_ms, extra or {}
    )
