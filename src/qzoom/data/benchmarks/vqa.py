"""Benchmarks with free answers: how their rows become questions.

chartqa    charts, questions written by people ("human") and generated ones ("augmented"); numbers within 5 %
docvqa     scanned pages, a short text from the page; ANLS
infovqa    long infographics, a short text or a number derived from them; ANLS
textvqa    photographs with text, ten annotators' answers each; prompt as lmms-eval's, including its lower case
ocrbench   five kinds of reading, from signs to formulas; the prediction must contain the answer
"""

from __future__ import annotations

from functools import partial

from qzoom.data.benchmarks.table import Benchmark, Row, text, texts
from qzoom.data.samples import SampleQuestion

_PHRASE = "Answer the question using a single word or phrase."
_FORMULAS = "HME100k"


def _chartqa(row: Row) -> SampleQuestion:
    kind = "human" if text(row, "type") == "human_test" else "augmented"
    prompt = f"{text(row, 'question')}\nAnswer the question with a single word."
    return SampleQuestion(kind, prompt, text(row, "answer"), metric="relaxed_accuracy")


def _docvqa(row: Row, field: str = "docvqa") -> SampleQuestion:
    answers = texts(row, "answers")
    return SampleQuestion(field, f"{text(row, 'question')}\n{_PHRASE}", answers[0], answers=answers, metric="anls")


def _textvqa(row: Row) -> SampleQuestion:
    answers = texts(row, "answers")
    prompt = f"{text(row, 'question').capitalize()}\n{_PHRASE}"
    most = max(answers, key=answers.count)
    return SampleQuestion("textvqa", prompt, most, answers=answers, metric="vqa_accuracy")


def _ocrbench(row: Row) -> SampleQuestion:
    answers = texts(row, "answer")
    metric = "contains_formula" if text(row, "dataset") == _FORMULAS else "contains"
    return SampleQuestion(
        text(row, "question_type"), text(row, "question").strip(), answers[0], answers=answers, metric=metric
    )


CHARTQA = Benchmark("chartqa", "lmms-lab-encoder/ChartQA", None, "test", 16, _chartqa, fields=("human", "augmented"))
DOCVQA = Benchmark("docvqa", "lmms-lab-encoder/DocVQA", "DocVQA", "validation", 32, _docvqa)
_infovqa = partial(_docvqa, field="infovqa")
INFOVQA = Benchmark("infovqa", "lmms-lab-encoder/DocVQA", "InfographicVQA", "validation", 32, _infovqa)
TEXTVQA = Benchmark("textvqa", "lmms-lab-encoder/textvqa", None, "validation", 128, _textvqa)
OCRBENCH = Benchmark("ocrbench", "echo840/OCRBench", None, "test", 128, _ocrbench)
