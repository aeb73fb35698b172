"""Boxes that a trained region branch proposes for the questions of the training packs.

What a zoom shows in use is not a margin around the known answer: it lies where the branch is sure, and holds the answer
mostly near its middle. The `*_pair` exercises therefore take most of their crops from here once a recipe names the
folder in `proposals`. Answers that a proposed box does not hold are trained on known places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from qzoom.checkpoints.weights import weights_digest
from qzoom.data.questions import RECEIPT_FIELDS
from qzoom.errors import DataError
from qzoom.model import QZoom
from qzoom.store.log import Log, LogWriter, differences
from tiny.pack import Box, Pack, PackedQuestion, Page

PURPOSE = "proposals"
PROPOSED_PACKS = ("documents_train", "scenes_train", "receipts_train")
"""Packs that boxes are proposed for; each has a log of its name."""
Proposals = dict[tuple[str, str], Box]
"""Boxes (xyxy, pixels of the page) by the page's name and the question."""

_BUDGETS = (64, 100, 144)
_THRESHOLDS = (0.4, 0.8)


def propose(
    model: QZoom,
    pack: Pack,
    path: Path,
    *,
    per_page: int = 6,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> None:
    """Write (or finish) the log `path` with boxes for up to `per_page` questions of every page.

    Token budget and region threshold vary from page to page, as they do in use.

    Raises:
        ConfigError: the log belongs to another model, pack or seed.
    """
    weights = weights_digest(model.engine)
    settings = {"weights": weights, "pack": asdict(pack.header), "per_page": per_page, "seed": seed}
    with LogWriter(path, PURPOSE, settings, sync_s=5, advice="delete it, or name another folder") as log:
        for number, page in enumerate(pack):
            if page.name not in log:
                rng = np.random.default_rng([seed, number])
                log.append(page.name, list(_of_page(model, page, per_page, rng)))
            if report is not None:
                report(number + 1)


def _of_page(model: QZoom, page: Page, count: int, rng: np.random.Generator) -> Iterable[list[object]]:
    known = [question for question in page.questions if question.boxes]
    chosen = _first_fields_first(known, rng)[:count]
    if not chosen:
        return
    session = model.session(Image.fromarray(page.pixels), coarse_tokens=int(rng.choice(_BUDGETS)))
    threshold = round(float(rng.uniform(*_THRESHOLDS)), 3)
    for question in chosen:
        seen = session.perceive(question.question, zoom="always", region_threshold=threshold)
        for region in seen.regions[:1]:
            yield [question.question, list(region.box)]


def _first_fields_first(questions: list[PackedQuestion], rng: np.random.Generator) -> list[PackedQuestion]:
    """In random order, the receipts' three fields first."""
    shuffled = [questions[int(i)] for i in rng.permutation(len(questions))]
    return sorted(shuffled, key=lambda question: question.field not in RECEIPT_FIELDS)


def read_proposals(folder: Path, packs: Mapping[str, Pack]) -> Proposals:
    """All boxes in a folder for the questions of some packs.

    Raises:
        DataError: there are none, one is damaged, belongs to another pack than the one of its name in `packs`, or does
            not hold all of its pages yet.
    """
    found: Proposals = {}
    for pack in PROPOSED_PACKS:
        if pack not in packs:
            continue
        path = folder / f"{pack}.jsonl"
        if not path.is_file():
            raise DataError(f"{folder} holds no proposed boxes for the pack {pack}; {_MAKE}.")
        with Log(path, PURPOSE) as log:
            _check_log(log, packs[pack])
            for name, items in log:
                for question, box in items:
                    x0, y0, x1, y1 = (int(edge) for edge in box)
                    found[name, str(question)] = (x0, y0, x1, y1)
    return found


def _check_log(log: Log, pack: Pack) -> None:
    """Refuse boxes of other pages, and those of a `propose` that did not end."""
    changed = differences(log.settings.get("pack"), asdict(pack.header))
    if changed:
        raise DataError(f"{log.path} holds boxes of another pack ({'; '.join(changed)}); delete it, and {_MAKE}.")
    missing = sum(name not in log for name in set(pack.names))
    if missing:
        raise DataError(f"{log.path} lacks the boxes of {missing} of {len(pack)} pages; {_MAKE}.")


_MAKE = "make them with `python tiny/train.py propose`"
