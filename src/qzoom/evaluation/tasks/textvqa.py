"""TextVQA: photographs with writing, ten people's answers each. The prompt is lmms-eval's, lower-casing included."""

from __future__ import annotations

from qzoom.evaluation.records import EvalQuestion
from qzoom.evaluation.tasks.table import Benchmark, Row, text, texts

__all__ = ["TEXTVQA"]


def _question(row: Row) -> EvalQuestion:
    answers = texts(row, "answers")
    asked = f"{text(row, 'question').capitalize()}\nAnswer the question using a single word or phrase."
    most = max(answers, key=answers.count)
    return EvalQuestion("textvqa", asked, most, answers=answers, metric="vqa_accuracy")


TEXTVQA = Benchmark("textvqa", "lmms-lab-encoder/textvqa", None, "validation", 128, _question)
