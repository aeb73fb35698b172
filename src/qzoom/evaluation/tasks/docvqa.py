"""DocVQA: scanned pages, answered by a short text from the page."""

from __future__ import annotations

from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, text, texts

__all__ = ["DOCVQA"]


def _question(row: Row) -> EvalQuestion:
    answers = texts(row, "answers")
    asked = f"{text(row, 'question')}\nAnswer the question using a single word or phrase."
    return EvalQuestion("docvqa", asked, answers[0], answers=answers, metric="anls")


DOCVQA = Benchmark("docvqa", "lmms-lab-encoder/DocVQA", "DocVQA", "validation", 32, _question)
