"""What became of pictures and items, counted: for the screen, for the report file and for the data set's card."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qzoom.distill.chain import Done
from qzoom.distill.compare import same
from qzoom.distill.records import Item

__all__ = ["Totals"]

_MOST_REASONS = 200
_OTHERS = "other reasons"
_NAMED = re.compile(r"^(?:Cannot read|The picture) .*?(?:: | (?=is missing|was changed))", re.DOTALL)


@dataclass(slots=True)
class Totals:
    """Counts of a run; the same after a rerun.

    Args:
        pictures: that could be opened, each once.
        duplicates: pictures that were there under another name too.
        refused_pictures: reason to count.
        entered: step to items that went in.
        kept: step to items that it kept.
        refused: step to reason to count.
        waiting: reason to items that a rerun has to try again.
        kinds: kind of question to kept items.
        datasets: where kept items come from.
        bins: size bin to kept items.
        negatives: kept items about what is not there.
        known: kind of question to kept items whose right answer the picture knows, negatives apart.
        right: how many of those agree with it.
        models: (role, model) to kept items.
    """

    pictures: int = 0
    duplicates: int = 0
    refused_pictures: Counter[str] = field(default_factory=Counter)
    entered: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    waiting: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    datasets: Counter[str] = field(default_factory=Counter)
    bins: Counter[int] = field(default_factory=Counter)
    negatives: int = 0
    known: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    models: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, done: Done) -> None:
        """Count a picture."""
        for reason in done.waiting:
            _count(self.waiting, reason)
        if done.picture is None:
            if done.reason:
                _count(self.refused_pictures, _general(done.reason))
            return
        self.pictures += 1
        for step, entered, kept in done.counts:
            self.entered[step] += entered
            self.kept[step] += kept
        for item in done.items:
            if not item.kept:
                last = next(one for one in item.decisions if not one.kept)
                _count(self.refused.setdefault(last.step, Counter()), _general(last.reason))

    def add_kept(self, item: Item) -> None:
        """Count what an exported item is."""
        if item.asked is not None:
            self.kinds[item.asked.kind] += 1
            self.negatives += item.asked.negative
            if item.asked.known and item.answer is not None and not item.asked.negative:
                self.known[item.asked.kind] += 1
                self.right[item.asked.kind] += same(item.asked.known, item.answer.text) is True
        self.datasets[item.picture.dataset or "distill"] += 1
        if item.region is not None:
            self.bins[item.region.area_bin] += 1
        self.models.update(dict.fromkeys(item.models, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in a fixed order."""
        return {
            "pictures": self.pictures,
            "duplicates": self.duplicates,
            "refused_pictures": _sorted(self.refused_pictures),
            "steps": {
                step: {
                    "entered": self.entered[step],
                    "kept": self.kept[step],
                    "refused": _sorted(self.refused.get(step, Counter())),
                }
                for step in self.entered
            },
            "waiting": _sorted(self.waiting),
            "kinds": _sorted(self.kinds),
            "datasets": _sorted(self.datasets),
            "area_bins": {str(key): self.bins[key] for key in sorted(self.bins)},
            "negatives": self.negatives,
            "known": {kind: {"agreed": n, "right": self.right[kind]} for kind, n in sorted(self.known.items())},
            "models": [[role, model, self.models[role, model]] for role, model in sorted(self.models)],
        }


def _count(counter: Counter[str], reason: str) -> None:
    counter[reason if reason in counter or len(counter) < _MOST_REASONS else _OTHERS] += 1


def _general(reason: str) -> str:
    """A reason without the name of the picture, so that equal ones are counted together."""
    return " ".join(_NAMED.sub("", reason).split())[:300] or "no reason given"


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return {key: counter[key] for key in sorted(counter)}
