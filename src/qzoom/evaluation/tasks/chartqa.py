"""ChartQA: charts with questions by people ("human") and by machine ("augmented")."""

from __future__ import annotations

from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, text

__all__ = ["CHARTQA"]


def _question(row: Row) -> EvalQuestion:
    kind = "human" if text(row, "type") == "human_test" else "augmented"
    asked = f"{text(row, 'question')}\nAnswer the question with a single word."
    return EvalQuestion(kind, asked, text(row, "answer"), metric="relaxed_accuracy")


CHARTQA = Benchmark("chartqa", "lmms-lab-encoder/ChartQA", None, "test", 16, _question, fields=("human", "augmented"))
