"""ZoomBench: fine detail in large images, as multiple choice ("mcq") or a short answer ("blank"), each with its region.

Two sets of column names are read: query and response as published, and prompt and answer as the authors' converter
writes them. Only some of the published prompts ask for the option's letter; here all prompts do, in the same words.
"""

from __future__ import annotations

import math
import re
from typing import Any

from qzoom.data.benchmarks.table import Benchmark, Row, optional_text, text
from qzoom.data.samples import SampleQuestion
from qzoom.errors import DataError
from qzoom.scoring.letters import LETTERS, chosen_letter
from qzoom.types import Box

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
SHORT_PROMPT = "Answer the question using a single word, number or phrase."
_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
_INLINE = re.compile(r"(?:^|\s)\(([A-Z])\)\s*(.+?)(?=\s*\([A-Z]\)|\s*$)", re.DOTALL)
_INSTRUCTION = re.compile(
    r"\s*\b(?:please\s+)?(?:answer|respond|reply|select|choose|output|give|provide|return)\b[^.!?\n]*\bletters?\b"
    r"[^.!?\n]*[.!]?\s*$",
    re.IGNORECASE,
)


def options_in(query: str) -> tuple[str, ...]:
    """The options' texts of a multiple-choice prompt, A first: one a line, or in a row after (A), (B) and so on.

    Empty where they do not run from A without a gap.
    """
    for pattern in (_LINE, _INLINE):
        found = pattern.findall(without_instruction(query))
        if len(found) > 1 and "".join(letter for letter, _ in found) == LETTERS[: len(found)]:
            return tuple(option.strip() for _, option in found)
    return ()


def without_instruction(query: str) -> str:
    """The prompt without a last sentence that asks for a letter."""
    return _INSTRUCTION.sub("", query.strip()).rstrip()


def _question(row: Row) -> SampleQuestion:
    query = text(row, "query" if "query" in row else "prompt").replace("<image>", "").strip()
    answer = text(row, "response" if "response" in row else "answer").strip()
    choices = options_in(query)
    guess = "mcq" if chosen_letter(answer, choices) else "blank"
    kind = (optional_text(row, "question_type") or guess).strip().lower()
    if kind not in ("mcq", "blank"):
        raise DataError(f"the column 'question_type' must be mcq or blank, not {kind!r:.20}.")
    boxes = _boxes(row.get("bbox"))
    if kind == "blank":
        return SampleQuestion(kind, f"{query}\n{SHORT_PROMPT}", answer, boxes, metric="blank_zoombench")
    choices = choices or tuple("ABCD")
    letter = chosen_letter(answer, choices)
    if letter is None:
        raise DataError(f"the answer {answer!r:.40} names none of the {len(choices)} options.")
    asked = f"{without_instruction(query)}\n{LETTER_PROMPT}"
    return SampleQuestion(kind, asked, letter, boxes, choices=choices, metric="choice_zoombench")


def _boxes(value: Any) -> tuple[Box, ...]:
    """The region in whole pixels, rounded outwards; none where the column is empty."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = re.findall(r"-?\d+(?:\.\d+)?", value)
    try:
        x0, y0, x1, y1 = (float(side) for side in value)
    except (TypeError, ValueError) as error:
        raise DataError(f"the column 'bbox' must hold four numbers, not {value!r:.60}.") from error
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise DataError(f"the column 'bbox' must be left, top, right, bottom of a region, not {value!r:.60}.")
    return ((math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)),)


ZOOMBENCH = Benchmark("zoombench", "inclusionAI/ZoomBench", None, "test", 128, _question, fields=("mcq", "blank"))
