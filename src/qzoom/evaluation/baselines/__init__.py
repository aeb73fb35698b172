"""Ways to look that zooming is measured against, one file each, all with one protocol (`base.Method`).

`METHODS` holds them by name, as `qzoom eval --method` asks for them.
"""

from __future__ import annotations

from qzoom.evaluation.baselines.base import Budget, Method, MethodAnswer
from qzoom.evaluation.baselines.model import ALWAYS, PLAIN, QZOOM

__all__ = ["METHODS", "Budget", "Method", "MethodAnswer"]

METHODS: dict[str, Method] = {method.name: method for method in (QZOOM, PLAIN, ALWAYS)}
