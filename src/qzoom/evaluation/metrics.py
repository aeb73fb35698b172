"""The figures of the evaluation as pure functions of texts and boxes (no model, no files).

Exact match forgives case, spaces and currency, nothing else: 33.90, RM33.90 and "$ 33.90" are the same amount, 33.9 is
another text. ANLS is the usual one of document questions, over normalised texts throughout. Boxes are xyxy in original
pixels, half-open.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from qzoom.images.geometry import clip_box, contains
from qzoom.types import Box

__all__ = [
    "ANLS_THRESHOLD",
    "anls",
    "edit_distance",
    "exact_match",
    "hit",
    "normalise",
    "union_share",
    "wilson_interval",
]

ANLS_THRESHOLD = 0.5
"""Similarities below it count as 0."""

_WORDS = (
    "rm|myr|usd|sgd|eur|gbp|jpy|cny|rmb|idr|thb|php|vnd|inr|aud|cad|nzd|hkd|twd|krw|chf|"
    "ringgit|dollars?|euros?|pounds?|yen|yuan"
)
_BEFORE = re.compile(rf"([-+]?)(?:({_WORDS})|us|sg?|au?|ca?|nz|hk|nt)([-+.\d].*)", re.DOTALL)
_AFTER = re.compile(rf"(?<=\d)(?:{_WORDS})$")
_AMOUNT = re.compile(r"[-+]?(?:\d[\d.,]*|\.\d+)")


def normalise(text: str) -> str:
    """The text without case and white space, and, if it is an amount, without its currency.

    An amount is a number with at most a sign, separators and a currency before or after it. Symbols are those that
    Unicode calls currencies; words are common codes and names, and the letters fixed to a symbol as in US$.
    """
    plain = "".join(text.casefold().split())
    bare = "".join(c for c in plain if unicodedata.category(c) != "Sc")
    symbols = len(plain) - len(bare)
    before = _BEFORE.fullmatch(bare)
    if before and (before[2] or symbols):
        bare = before[1] + before[3]
    bare = _AFTER.sub("", bare)
    return bare if symbols <= 1 and _AMOUNT.fullmatch(bare) else plain


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two texts are equal, case, spaces and currency aside."""
    return normalise(prediction) == normalise(answer)


def edit_distance(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of characters that turn one text into the other."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised Levenshtein similarity to the closest of the right answers, 0 below the threshold.

    Texts are compared in lower case with runs of white space as one space; lengths are those of the compared texts.

    Args:
        prediction: what was answered.
        answers: at least one right answer.
        threshold: the least similarity that counts.

    Returns:
        A number from 0 to 1.
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(said), len(wanted))
        best = max(best, 1.0 - edit_distance(said, wanted) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def hit(regions: Sequence[Box], boxes: Sequence[Box]) -> bool:
    """Whether one region holds one of the answer's boxes wholly."""
    return any(contains(region, box) for region in regions for box in boxes)


def union_share(boxes: Sequence[Box], size_px: tuple[int, int]) -> float:
    """Share of a picture that boxes cover together; what they share counts once.

    Args:
        boxes: any number of boxes; parts outside the picture do not count.
        size_px: (width, height) of the picture.
    """
    inside = [clip_box(box, size_px) for box in boxes]
    edges = sorted({x for box in inside for x in (box[0], box[2])})
    covered = 0
    for left, right in pairwise(edges):
        spans = sorted((box[1], box[3]) for box in inside if box[0] <= left and right <= box[2])
        end = 0
        for top, bottom in spans:
            covered += (right - left) * max(0, bottom - max(top, end))
            end = max(end, bottom)
    return covered / (size_px[0] * size_px[1])


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % with the default `z`; (0, 1) without trials."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
