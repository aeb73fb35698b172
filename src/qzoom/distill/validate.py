"""Step validate: a question stays if the crop answers it, the whole picture has one such thing, and nothing leaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qzoom.distill.records import Item
from qzoom.distill.roles.base import CallRefusedError, Validator, asked_of, with_model
from qzoom.distill.roles.by_rule import leak
from qzoom.distill.steps import Views

__all__ = ["ValidateStep"]


@dataclasses.dataclass(frozen=True, slots=True)
class ValidateStep:
    """Keeps or refuses a question.

    Args:
        validator: who checks.
        views: what it may look at.
    """

    validator: Validator
    views: Views
    name: str = "validate"

    def __call__(self, item: Item) -> Sequence[Item]:
        """The item with the decision; leaks are found by rule before anyone is asked."""
        asked = asked_of(item)
        reason = leak(asked.text, asked.known)
        if not reason:
            item = with_model(item, "validator", self.validator.model)
            try:
                reason = self.validator.check(item, self.views)
            except CallRefusedError:
                reason = "the validator refused the picture"
        return (item.decide(self.name, not reason, reason),)
