"""Step ask: questions about a place, from its crop alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qzoom.distill.records import Item
from qzoom.distill.roles.base import Asker, CallRefusedError, with_model
from qzoom.distill.steps import Views

__all__ = ["AskStep"]


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
