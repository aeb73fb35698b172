"""The figures of the evaluation as pure functions of texts and boxes (no model, no files).

Exact match forgives case, spaces, currency and marks at the end, nothing else: 33.90, RM33.90 and "$ 33.90." are the
same amount, 33.9 is another text. `METRICS` holds each benchmark's metric twice: "strict" does what the metric's name
promises, "harness" gives lmms-eval's figure to the last slip, which is what published tables contain. Boxes are xyxy in
original pixels, half-open.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qzoom.images.geometry import clip_box, contains
from qzoom.scoring.agree import exact_match
from qzoom.scoring.letters import chosen_letter, chosen_letter_hrbench, chosen_letter_mme, chosen_letter_vstar
from qzoom.scoring.text import (
    plain_answer,
    read_number,
    release_letter,
    same_answer,
    same_answer_release,
    without_final_marks,
)
from qzoom.types import Box

ANLS_THRESHOLD = 0.5
"""Strict similarities up to it count as 0; the harness variant still counts it."""


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
    """Normalised Levenshtein similarity to the closest of the right answers, 0 up to the threshold.

    Texts are compared in lower case with runs of white space as one space and without marks at their ends; lengths are
    those of the compared texts.

    Args:
        threshold: the similarity must lie above it; so a distance of exactly one half scores 0.

    Returns:
        A number from 0 to 1.
    """
    said = " ".join(without_final_marks(prediction).lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(without_final_marks(answer).lower().split())
        longest = max(len(said), len(wanted))
        best = max(best, 1.0 - edit_distance(said, wanted) / longest if longest else 1.0)
    return best if best > threshold else 0.0


def anls_harness(prediction: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """ANLS as the harnesses compute it: distances of the normalised texts over lengths of the raw ones.

    Args: as in `anls`, but a similarity of exactly `threshold` counts.
    """
    said = " ".join(prediction.strip().lower().split())
    distances = []
    for answer in answers:
        longest = max(len(answer.upper()), len(prediction.upper()))
        wanted = " ".join(answer.strip().lower().split())
        distances.append(edit_distance(wanted, said) / longest if longest else 0.0)
    best = 1 - min(distances)
    return best if best >= threshold else 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str], *, harness: bool = False) -> float:
    """Agreement with ten people: the mean over all choices of nine of them of min(1, agreeing / 3).

    Args:
        answers: one per person; equal answers are repeated. A single one must be met.
        harness: see `qzoom.scoring.text.plain_answer`; and a single answer then counts for nothing.
    """
    said = plain_answer(prediction, harness=harness)
    people = [plain_answer(answer, harness=harness) for answer in answers]
    if len(people) == 1 and not harness:
        return float(said == people[0])
    equal = [said == answer for answer in people]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(people)


def relaxed_match(prediction: str, answer: str, tolerance: float = 0.05) -> bool:
    """Numbers within a relative tolerance, other texts equal up to case and outer spaces.

    Numbers are what `qzoom.scoring.text.read_number` reads. 0 is met by 0 alone, and a bare four-digit year (1000 to
    2999 without sign, comma or unit) by the same number alone.
    """
    prediction, answer = without_final_marks(prediction), without_final_marks(answer)
    said, wanted = read_number(prediction), read_number(answer)
    if said is not None and wanted is not None:
        return abs(said - wanted) <= (0.0 if _YEAR.fullmatch(answer) else tolerance * abs(wanted))
    return prediction.casefold() == answer.casefold()


_YEAR = re.compile(r"[12]\d{3}")


def relaxed_match_harness(prediction: str, answer: str, tolerance: float = 0.05) -> bool:
    """The same as lmms-eval computes it: no commas in numbers, 0 is a text, outer spaces count in texts."""
    said, wanted = _plain_float(prediction), _plain_float(answer)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == answer.lower()


def _plain_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def contains_answer(prediction: str, answers: Sequence[str], *, formula: bool = False) -> bool:
    """Whether one of the answers stands in the prediction as words of its own, case and width of characters aside.
    `formula`: spaces and word borders do not matter, case does."""
    said = _folded(prediction, formula=formula)
    for answer in answers:
        wanted = _folded(answer if formula else without_final_marks(answer), formula=formula)
        start = said.find(wanted) if wanted else -1
        while start >= 0:
            end = start + len(wanted)
            if formula or not (_joined(said, start) or _joined(said, end)):
                return True
            start = said.find(wanted, start + 1)
    return False


def _folded(text: str, *, formula: bool) -> str:
    words = unicodedata.normalize("NFKC", text).split()
    return "".join(words) if formula else " ".join(words).casefold()


def _joined(text: str, at: int) -> bool:
    """Whether the characters on both sides of a place belong to one word of letters or digits."""
    return 0 < at < len(text) and all(c.isascii() and c.isalnum() for c in text[at - 1 : at + 1])


def contains_answer_harness(prediction: str, answers: Sequence[str], *, formula: bool = False) -> bool:
    """OCRBench as lmms-eval scores it: any substring counts, even of a longer number, and an empty answer always."""
    if formula:
        said = prediction.strip().replace("\n", " ").replace(" ", "")
        return any(answer.strip().replace("\n", " ").replace(" ", "") in said for answer in answers)
    said = _narrow(prediction.strip()).lower().strip().replace("\n", " ")
    return any(_narrow(answer).lower().strip().replace("\n", " ") in said for answer in answers)


def _narrow(text: str) -> str:
    """Full-width ASCII as ASCII, nothing else."""
    return "".join(chr(ord(c) - 0xFEE0) if 0xFF01 <= ord(c) <= 0xFF5E else " " if c == "\u3000" else c for c in text)


Score = Callable[[str, Sequence[str], Sequence[str]], float]
"""Prediction, accepted answers and options' texts to a score from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One benchmark's metric in both variants."""

    strict: Score  # what the metric's name promises
    harness: Score  # the same as lmms-eval gives it; for ZoomBench, which lmms-eval lacks, as the authors' release does

    @property
    def is_choice(self) -> bool:
        """Whether an option is to be named."""
        return self.strict is _letter


def _any(same: Callable[[str, str], bool]) -> Score:
    """Full marks for an answer that is the same as one of those accepted."""
    return lambda said, answers, _: float(any(same(said, answer) for answer in answers))


def _letter(said: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    return float(chosen_letter(said, choices) in answers)


def _letter_harness(read: Callable[[str], str | None]) -> Score:
    return lambda said, answers, _: float(read(said) in answers)


def is_unread(metric: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether an answer to a multiple-choice question names no option clearly, so that it counts as wrong unread."""
    return METRICS[metric].is_choice and chosen_letter(prediction, choices) is None


METRICS: dict[str, Metric] = {
    "exact_match": Metric(_any(exact_match), _any(exact_match)),
    "anls": Metric(lambda said, answers, _: anls(said, answers), lambda said, answers, _: anls_harness(said, answers)),
    "vqa_accuracy": Metric(
        lambda said, answers, _: vqa_accuracy(said, answers),
        lambda said, answers, _: vqa_accuracy(said, answers, harness=True),
    ),
    "relaxed_accuracy": Metric(
        _any(relaxed_match), lambda said, answers, _: float(relaxed_match_harness(said, answers[0]))
    ),
    "contains": Metric(
        lambda said, answers, _: float(contains_answer(said, answers)),
        lambda said, answers, _: float(contains_answer_harness(said, answers)),
    ),
    "contains_formula": Metric(
        lambda said, answers, _: float(contains_answer(said, answers, formula=True)),
        lambda said, answers, _: float(contains_answer_harness(said, answers, formula=True)),
    ),
    "choice_vstar": Metric(_letter, _letter_harness(chosen_letter_vstar)),
    "choice_mme": Metric(_letter, _letter_harness(chosen_letter_mme)),
    "choice_hrbench": Metric(
        _letter, lambda said, answers, choices: float(chosen_letter_hrbench(said, choices) in answers)
    ),
    "choice_zoombench": Metric(_letter, _letter_harness(release_letter)),
    "blank_zoombench": Metric(_any(same_answer), _any(same_answer_release)),
}


def hit(regions: Sequence[Box], boxes: Sequence[Box]) -> bool:
    """Whether one region holds one of the answer's boxes wholly."""
    return any(contains(region, box) for region in regions for box in boxes)


def union_share(boxes: Sequence[Box], size_px: tuple[int, int]) -> float:
    """Share of a picture that boxes cover together; what they share counts once."""
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
