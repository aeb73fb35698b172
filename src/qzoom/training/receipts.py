"""Real scanned receipts as training examples: pairs of coarse view and crop, and single views, as for synthetic pages.

A split is a JSONL file beside the images; each line names an image and asks for total, date and company, with a box
around every printed line of the answer. The positions of single characters are unknown, so there is no auxiliary loss.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from qzoom.data.questions import read_receipts
from qzoom.data.synthetic.page import SyntheticQuestion
from qzoom.training.batch import Example
from qzoom.training.crops import crop_around, inside, region_tokens, snippet_box
from qzoom.training.patches import fit_to_tokens
from qzoom.training.views import build_example, cut_view

__all__ = ["Receipt", "ReceiptSet", "load_receipts", "target_text"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """One scanned receipt and its questions."""

    image: Path
    questions: tuple[SyntheticQuestion, ...]


@dataclass(frozen=True, slots=True)
class ReceiptSet:
    """The receipts of two splits: those to train on and those to measure with."""

    train: tuple[Receipt, ...]
    held_out: tuple[Receipt, ...]


def target_text(field: str, answer: str) -> str:
    """The answer as the model should write it: totals without currency, companies in capitals, spaces single."""
    text = " ".join(answer.split())
    if field == "total":
        text = re.sub(r"^(RM|MYR|\$)\s*", "", text, flags=re.IGNORECASE)
    return text.upper() if field == "company" else text


def load_receipts(folder: str | Path, split: str) -> tuple[Receipt, ...]:
    """The receipts of `folder`/`split`.jsonl, read and checked by the evaluation's own reader.

    Raises:
        DataError: the file or a picture is missing, or a line cannot be used; it says which.
    """
    return tuple(
        Receipt(
            Path(str(sample.image)),
            tuple(
                SyntheticQuestion(q.field, q.question, target_text(q.field, q.answer), q.boxes, False)
                for q in sample.questions
            ),
        )
        for sample in read_receipts(Path(folder), split).samples
    )


@lru_cache(maxsize=300)
def _picture(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return ImageOps.exif_transpose(opened).convert("L")


def receipt_examples(
    receipts: tuple[Receipt, ...],
    rng: np.random.Generator,
    sizes: np.random.Generator,
    kind: str,
    count: int,
    budget: int,
) -> list[Example]:
    """`count` examples of one kind: "pair" (coarse view and region crop), "plain" (one look at `budget` tokens) or
    "snippet" (a readable crop)."""
    shape = [(8, 3), (8, 4), (10, 3), (12, 4)][int(sizes.integers(4))]
    examples: list[Example] = []
    while len(examples) < count:
        receipt = receipts[int(rng.integers(len(receipts)))]
        image = _picture(receipt.image)
        image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.85, 1.1)))
        if kind == "plain":
            view = cut_view(image, None, fit_to_tokens(*image.size, budget))
            examples.append(build_example("receipt", [view], (), list(receipt.questions), with_glyphs=False))
            continue
        boxed = [question for question in receipt.questions if question.boxes]
        if not boxed:
            continue
        question = boxed[int(rng.integers(len(boxed)))]
        target = question.boxes[int(rng.integers(len(question.boxes)))]
        tokens = fit_to_tokens(*image.size, budget)
        if kind == "pair":
            box = crop_around(target, image.size, rng, image.size[0] / tokens[0])
            views = [cut_view(image, None, tokens), cut_view(image, box, region_tokens(box, rng))]
        else:
            box = snippet_box(target, image.size, float(np.exp(rng.uniform(np.log(18), np.log(44)))), shape, rng)
            views = [cut_view(image, box, shape)]
        shown = [question, *(q for q in boxed if q is not question and inside(q, box))]
        examples.append(build_example("receipt", views, (), shown, with_glyphs=False))
    return examples
