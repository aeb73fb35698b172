"""Step ask: questions about a place, from its crop alone.

Step validate: a question stays if the crop answers it, the whole picture has one such thing, and nothing leaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qzoom.distill.by_rule import leak
from qzoom.distill.items import Item, Views
from qzoom.distill.roles import Asker, Validator, asked_of, with_model
from qzoom.errors import CallRefusedError

__all__ = ["AskStep", "ValidateStep"]


@dataclasses.dataclass(frozen=True, slots=True)
class AskStep:
    """Makes an item of every question that the asker has about a region.

    Args:
        asker: who asks.
        views: what it may look at.
    """

    asker: Asker
    views: Views
    name: str = "ask"

    def __call__(self, item: Item) -> Sequence[Item]:
        """One item a question; the refused item where there is none."""
        item = with_model(item, "asker", self.asker.model)
        try:
            asked = self.asker.ask(item, self.views)
        except CallRefusedError:
            return (item.decide(self.name, False, "the asker refused the picture"),)
        if not asked:
            return (item.decide(self.name, False, "no question about this place"),)
        return tuple(dataclasses.replace(item, asked=one).decide(self.name, True) for one in asked)


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
