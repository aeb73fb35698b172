"""qzoom's own region maps as proposals: where the model would look for what it is asked."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from qzoom.distill.propose.base import MapsSettings, Proposal
from qzoom.distill.records import Item
from qzoom.distill.steps import Views

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = ["MapsProposer"]


class MapsProposer:
    """See `qzoom.distill.propose.base.Proposer`. The model is loaded at the first picture; one look at a time.

    Args:
        settings: which model, and what its maps are asked for.
    """

    name = "maps"

    def __init__(self, settings: MapsSettings) -> None:
        self.settings = settings
        self._model: QZoom | None = None
        self._lock = threading.Lock()

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """The regions of all questions, each box once with its best score.

        Raises:
            HeadsMissingError: the model has no region branch.
            CheckpointError: it cannot be loaded.
        """
        asked = list(self.settings.questions)
        if self.settings.own_questions:
            asked += [question.text for question in views.known(item).questions]
        found: dict[tuple[int, int, int, int], float] = {}
        image = views.whole(item)
        with self._lock:
            model = self._loaded()
            for question in dict.fromkeys(asked):
                seen = model.perceive(image, question, region_threshold=self.settings.region_threshold)
                for region in seen.regions:
                    found[region.box] = max(region.score, found.get(region.box, 0.0))
        return tuple(Proposal(box, score) for box, score in found.items())

    def _loaded(self) -> QZoom:
        if self._model is None:
            from qzoom.model import QZoom

            settings = self.settings
            self._model = QZoom.from_pretrained(settings.model, revision=settings.revision, device_map=settings.device)
        return self._model
