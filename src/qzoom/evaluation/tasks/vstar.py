"""V*: small things in large photographs, as multiple choice; the options stand in the question's text."""

from __future__ import annotations

import re

from qzoom.evaluation.letters import LETTERS
from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, option_letter, optional_text, text

__all__ = ["VSTAR"]

_OPTION = re.compile(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)")


def _question(row: Row) -> EvalQuestion:
    given = text(row, "text")
    choices = tuple(option.strip() for option in _OPTION.findall(given))[:4]
    asked = given
    if choices:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        asked = "\n".join([given.split("(A)")[0].strip(), *lines])
    asked += "\nAnswer with the option's letter from the given choices directly."
    label = option_letter(row, "label", 4)
    return EvalQuestion(
        optional_text(row, "category") or "unknown",
        asked,
        label,
        choices=choices or tuple("ABCD"),
        metric="choice_vstar",
    )


VSTAR = Benchmark("vstar", "lmms-lab-encoder/vstar-bench", None, "test", 16, _question)
