"""Ways to look that zooming is measured against, one file each, all with one protocol (`base.Method`).

`METHODS` holds them by name, as `qzoom eval --method` asks for them.
"""

from __future__ import annotations

from qzoom.evaluation.baselines.agentic import AGENTIC
from qzoom.evaluation.baselines.attention import ATTENTION
from qzoom.evaluation.baselines.base import Budget, Method, MethodAnswer
from qzoom.evaluation.baselines.confidence import ENTROPY, MARGIN
from qzoom.evaluation.baselines.fixed import CENTRE, ORACLE, RANDOM
from qzoom.evaluation.baselines.model import ALWAYS, PLAIN, QZOOM

__all__ = ["METHODS", "Budget", "Method", "MethodAnswer"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (QZOOM, PLAIN, ALWAYS, ATTENTION, AGENTIC, RANDOM, CENTRE, ORACLE, MARGIN, ENTROPY)
}
