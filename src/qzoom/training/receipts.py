"""Real scanned receipts as training examples: the same coarse-and-region pairs and plain looks as for drawn pages.

A split is a JSONL file beside the pictures; each line names a picture and asks for total, date and company, with a box
around every printed line that holds the answer. Nothing is known about single characters, so both guides stay silent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from qzoom.errors import DataError
from qzoom.synthetic.records import SyntheticQuestion
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
    """The receipts of `folder`/`split`.jsonl; a malformed line is a `DataError` that names it."""
    path = Path(folder) / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"Receipts file {path} cannot be read: {error.strerror}; give the folder that holds it."
        ) from error
    receipts = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            questions = tuple(
                SyntheticQuestion(
                    str(entry["field"]),
                    str(entry["question"]),
                    target_text(str(entry["field"]), str(entry["answer"])),
                    tuple((int(b[0]), int(b[1]), int(b[2]), int(b[3])) for b in entry["boxes"]),
                    False,
                )
                for entry in row["questions"]
            )
            receipts.append(Receipt(path.parent / str(row["image"]), questions))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{path}, line {number}: not a receipt record ({type(error).__name__}: {error})."
            ) from error
    return tuple(receipts)


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
    """`count` examples of one kind: "pair" (coarse look and region crop), "plain" (one look at `budget` tokens) or
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
