"""MME-RealWorld-Lite: perception and reasoning on large real pictures, five options each."""

from __future__ import annotations

import re

from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, option_letter, text, texts

__all__ = ["MME_REALWORLD_LITE"]

_LABEL = re.compile(r"^\s*\([A-Z]\)\s*")


def _question(row: Row) -> EvalQuestion:
    options = texts(row, "multi-choice options")
    kind = "perception" if "perception" in text(row, "category").lower() else "reasoning"
    listed = "\n".join(options)
    asked = (
        f"{text(row, 'question')} The choices are listed below:\n{listed}\n"
        "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
        "(A, B, C, D, or E) of the correct option.\nThe best answer is: "
    )
    choices = tuple(_LABEL.sub("", option) for option in options)
    return EvalQuestion(kind, asked, option_letter(row, "answer", len(options)), choices=choices, metric="choice_mme")


MME_REALWORLD_LITE = Benchmark(
    "mme_realworld_lite",
    "yifanzhang114/MME-RealWorld-lite-lmms-eval",
    None,
    "train",
    16,
    _question,
    picture="bytes",
    fields=("perception", "reasoning"),
)
