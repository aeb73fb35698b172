"""HR-Bench at 4K and 8K: every question asked with its options in four orders, which all count alike."""

from __future__ import annotations

from qzoom.errors import DataError
from qzoom.evaluation.letters import LETTERS
from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, option_letter, optional_text, text

__all__ = ["HRBENCH_4K", "HRBENCH_8K"]


def _question(row: Row) -> EvalQuestion:
    given = {letter: optional_text(row, letter) for letter in LETTERS}
    options = {letter: option for letter, option in given.items() if option is not None}
    if "".join(options) != LETTERS[: len(options)] or not options:
        raise DataError("the options must fill the columns A, B, C and so on without a gap.")
    listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    asked = f"{text(row, 'question').strip()}\n{listed}Answer the option letter directly."
    return EvalQuestion(
        text(row, "category"),
        asked,
        option_letter(row, "answer", len(options)),
        choices=tuple(options.values()),
        metric="choice_hrbench",
    )


HRBENCH_4K = Benchmark(
    "hrbench4k", "DreamMr/HR-Bench", "hrbench_version_split", "hrbench_4k", 128, _question, fields=("single", "cross")
)
HRBENCH_8K = Benchmark(
    "hrbench8k", "DreamMr/HR-Bench", "hrbench_version_split", "hrbench_8k", 128, _question, fields=("single", "cross")
)
