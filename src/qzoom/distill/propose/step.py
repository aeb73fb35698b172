"""The propose step: what the proposers name becomes items, those left out with their reason."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qzoom.distill.propose.base import Proposer, ProposeSettings, make_proposer
from qzoom.distill.propose.select import select
from qzoom.distill.records import Item, Region
from qzoom.distill.steps import Views
from qzoom.errors import DataError

__all__ = ["ProposeStep", "make_propose_step"]


@dataclass(frozen=True, slots=True)
class ProposeStep:
    """One item per proposed region; see `qzoom.distill.steps.Step`."""

    proposers: tuple[Proposer, ...]
    views: Views
    settings: ProposeSettings
    seed: int = 0
    name: str = "propose"

    def __call__(self, item: Item) -> Sequence[Item]:
        """Items in the order of the proposers; a picture on which nothing is proposed is refused.

        Raises:
            ImageError: a proposer cannot open the picture.
            DataError: nothing was proposed.
        """
        named = [(proposer.name, one) for proposer in self.proposers for one in proposer(item, self.views)]
        if not named:
            raise DataError("nothing proposed")
        picture = item.picture
        boxes = [one.box for _, one in named]
        chosen = select(boxes, [one.score for _, one in named], (picture.width, picture.height), self.settings.select)
        out = []
        for (proposer, one), result in zip(named, chosen, strict=True):
            box = result.box if not result.reason else one.box
            score = round(min(1.0, max(0.0, one.score)), 6)
            region = Region(box, box, proposer, 1.0, score, one.phrase, result.area_bin)
            made = replace(item, region=region, seed=item_seed(self.seed, picture.digest, box))
            out.append(made.decide(self.name, not result.reason, result.reason))
        return out


def make_propose_step(settings: ProposeSettings, views: Views, seed: int) -> ProposeStep:
    """The step of a recipe; models are loaded when the first picture comes.

    Raises:
        ConfigError: an unknown proposer.
    """
    return ProposeStep(tuple(make_proposer(name, settings) for name in settings.by), views, settings, seed)


def item_seed(seed: int, digest: str, box: Sequence[int]) -> int:
    """The seed of all that is drawn for a region: 31 bits of a hash."""
    text = f"{seed}/{digest}/{','.join(map(str, box))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
