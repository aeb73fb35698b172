"""Boxes that come with a picture: of its questions' answers, and of a drawn scene's objects."""

from __future__ import annotations

from dataclasses import dataclass

from qzoom.distill.propose.base import GivenSettings, Proposal
from qzoom.distill.records import Item
from qzoom.distill.steps import Views

__all__ = ["GivenProposer"]


@dataclass(frozen=True, slots=True)
class GivenProposer:
    """See `qzoom.distill.propose.base.Proposer`."""

    settings: GivenSettings
    name: str = "given"

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """Each box once, those of questions first."""
        known = views.known(item)
        found: dict[tuple[int, int, int, int], Proposal] = {}
        if self.settings.questions:
            for question in known.questions:
                for box in question.boxes:
                    found.setdefault(box, Proposal(box))
        if self.settings.objects:
            for thing in known.objects:
                named = Proposal(thing.box, phrase=f"{thing.colour} {thing.shape}")
                if not found.get(thing.box, Proposal(thing.box)).phrase:
                    found[thing.box] = named
        return tuple(found.values())
