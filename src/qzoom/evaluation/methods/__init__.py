"""The methods that zooming is compared with, all with one interface (`base.Method`).

`METHODS` maps the names of `qzoom eval --method` to them.
"""

from __future__ import annotations

from qzoom.evaluation.methods.agentic import AGENTIC
from qzoom.evaluation.methods.attention import ATTENTION
from qzoom.evaluation.methods.base import ALWAYS, PLAIN, QZOOM, Method
from qzoom.evaluation.methods.confidence import ENTROPY, MARGIN
from qzoom.evaluation.methods.fixed import CENTRE, ORACLE, RANDOM

__all__ = ["METHODS", "Method"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (QZOOM, PLAIN, ALWAYS, ATTENTION, AGENTIC, RANDOM, CENTRE, ORACLE, MARGIN, ENTROPY)
}
