"""Held-out exact match, by exercise and on real receipts with known boxes.

All figures are exact match of whole answers under teacher forcing (every answer token the arg-max given the ones
before it), which is what greedy decoding writes. `<exercise>` counts every question of the exercise on held-out pages;
`<exercise>/seen` counts the lines that the guide layer alone spells right (spaces aside), which says what the vision
tower can read. `dev_*` are the development receipts, a single view, a crop of the known answer box grown by 30 % of its
height on every side, enlarged to 32 visual tokens as the zoom does; `dev_pair_*` show the page at 144 tokens first.
`real_line/new`, `dev_company/new` and `dev_pair_company/new` count the answers of letters that are no line of the
training receipts: those can only be read, not remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from qzoom.data.questions import RECEIPT_FIELDS
from tiny.aux_losses import GuidedModel
from tiny.batch import Example, collate, split_pool
from tiny.curriculum import Context, examples_of
from tiny.pack import Pack
from tiny.render_views import View, fit_to_tokens
from tiny.view_targets import build_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WITH_NEW = ("real_line", "dev_company", "dev_pair_company")
"""Figures that are also told for texts that are new."""


def measure(
    guided: GuidedModel, tokenizer: PreTrainedTokenizerFast, packs: dict[str, Pack], tasks: Iterable[str], count: int
) -> dict[str, float]:
    """Exact match by exercise on about `count` held-out examples each, and on the development receipts."""
    figures: dict[str, float] = {}
    trained = {_plain(line.text) for page in packs.get("receipts_train", ()) for line in page.lines}
    for name, examples in _groups(packs, tasks, count):
        answers, lines = exact_match(guided, tokenizer, examples)
        found = {name: answers, f"{name}/seen": lines}
        if name in _WITH_NEW:
            found[f"{name}/new"], _ = exact_match(guided, tokenizer, new_texts(examples, trained))
        figures |= {key: value for key, value in found.items() if value is not None}
    return figures


def _groups(packs: dict[str, Pack], tasks: Iterable[str], count: int) -> Iterator[tuple[str, list[Example]]]:
    """What is measured, by the figure's name."""
    for number, task in enumerate(sorted(set(tasks))):
        context = Context(packs, np.random.default_rng([7, number]), held_out=True)
        examples: list[Example] = []
        while len(examples) < count:
            examples += examples_of(task, context)
        yield task, examples
    if "receipts_dev" in packs:
        yield from dev_examples(packs["receipts_dev"]).items()


def new_texts(examples: list[Example], trained: set[str]) -> list[Example]:
    """The examples whose only answer has more letters than digits and is none of the `trained` texts, which are in
    capitals with single spaces."""

    def is_new(text: str) -> bool:
        return sum(map(str.isalpha, text)) > sum(map(str.isdigit, text)) and _plain(text) not in trained

    return [example for example in examples if len(example.queries) == 1 and is_new(example.queries[0].answer)]


def _plain(text: str) -> str:
    return " ".join(text.upper().split())


def dev_examples(pack: Pack) -> dict[str, list[Example]]:
    """The development questions whose answer box is known, by figure."""
    found: dict[str, list[Example]] = {}
    for page in pack:
        for question in page.questions:
            if not question.boxes or question.field not in RECEIPT_FIELDS:
                continue
            x0, y0, x1, y1 = question.boxes[0]
            grow = 0.3 * (y1 - y0)
            height, width = page.pixels.shape[:2]
            box = (max(0, x0 - grow), max(0, y0 - grow), min(width, x1 + grow), min(height, y1 + grow))
            tokens = fit_to_tokens(box[2] - box[0], box[3] - box[1], 144, 32)
            crop = View(page.pixels, box, tokens)
            name = "company" if question.field == "company" else "total_date"
            found.setdefault(f"dev_{name}", []).append(build_example("dev", [crop], page, [question]))
            whole = View(page.pixels, None, fit_to_tokens(width, height, 144))
            found.setdefault(f"dev_pair_{name}", []).append(build_example("dev", [whole, crop], page, [question]))
    return found


@torch.no_grad()
def exact_match(
    guided: GuidedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> tuple[float | None, float | None]:
    """Shares of questions answered and of lines spelled exactly; None where there are none."""
    right = asked = read = lines = 0
    for group in split_pool(examples, tokenizer, 2048):
        result = guided(collate(group, tokenizer))
        right += int((result.exact == 1).sum())
        asked += int((result.exact >= 0).sum())
        read += int(result.lines_exact.sum())
        lines += len(result.lines_exact)
    return (round(right / asked, 4) if asked else None, round(read / lines, 4) if lines else None)
