"""Tiles of equal size that cover a picture."""

from __future__ import annotations

from dataclasses import dataclass

from qzoom.distill.propose.base import GridSettings, Proposal
from qzoom.distill.records import Item
from qzoom.distill.steps import Views

__all__ = ["GridProposer"]


@dataclass(frozen=True, slots=True)
class GridProposer:
    """See `qzoom.distill.propose.base.Proposer`."""

    settings: GridSettings
    name: str = "grid"

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """Row by row; the last tiles of a row and of a column end on the picture's edge."""
        across = _spans(item.picture.width, self.settings.columns, self.settings.overlap)
        down = _spans(item.picture.height, self.settings.rows, self.settings.overlap)
        return tuple(Proposal((x0, y0, x1, y1)) for y0, y1 in down for x0, x1 in across)


def _spans(side_px: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """Intervals of one length, each repeating a share of the one before."""
    length = side_px / (1 + (count - 1) * (1 - overlap))
    step = length * (1 - overlap)
    spans = [(round(i * step), min(side_px, round(i * step + length))) for i in range(count)]
    return [span for span in spans if span[1] > span[0]]
