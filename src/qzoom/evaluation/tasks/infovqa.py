"""InfographicVQA: long infographics, answered by a short text or a number worked out from them."""

from __future__ import annotations

from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, text, texts

__all__ = ["INFOVQA"]


def _question(row: Row) -> EvalQuestion:
    answers = texts(row, "answers")
    asked = f"{text(row, 'question')}\nAnswer the question using a single word or phrase."
    return EvalQuestion("infovqa", asked, answers[0], answers=answers, metric="anls")


INFOVQA = Benchmark("infovqa", "lmms-lab-encoder/DocVQA", "InfographicVQA", "validation", 32, _question)
