"""Ways to look that zooming is measured against, one file each, all with one protocol (`base.Method`).

`METHODS` holds them by name, as `qzoom eval --method` asks for them.
"""

from __future__ import annotations

from qzoom.evaluation.methods.agentic import AGENTIC
from qzoom.evaluation.methods.attention import ATTENTION
from qzoom.evaluation.methods.base import ALWAYS, PLAIN, QZOOM, Budget, Method, MethodAnswer
from qzoom.evaluation.methods.confidence import ENTROPY, MARGIN
from qzoom.evaluation.methods.fixed import CENTRE, ORACLE, RANDOM

__all__ = ["METHODS", "Budget", "Method", "MethodAnswer"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (QZOOM, PLAIN, ALWAYS, ATTENTION, AGENTIC, RANDOM, CENTRE, ORACLE, MARGIN, ENTROPY)
}
