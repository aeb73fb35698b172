"""OCRBench: five kinds of reading, from signs to formulas; the answer has to stand in what is said."""

from __future__ import annotations

from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, text, texts

__all__ = ["OCRBENCH"]

_FORMULAS = "HME100k"


def _question(row: Row) -> EvalQuestion:
    answers = texts(row, "answer")
    metric = "contains_formula" if text(row, "dataset") == _FORMULAS else "contains"
    return EvalQuestion(
        text(row, "question_type"), text(row, "question").strip(), answers[0], answers=answers, metric=metric
    )


OCRBENCH = Benchmark("ocrbench", "echo840/OCRBench", None, "test", 128, _question)
