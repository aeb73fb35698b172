"""ChartQA: charts with questions by people ("human") and by machine ("augmented").

DocVQA: scanned pages, answered by a short text from the page.

InfographicVQA: long infographics, answered by a short text or a number worked out from them.

TextVQA: photographs with writing, ten people's answers each. The prompt is lmms-eval's, lower-casing included.

OCRBench: five kinds of reading, from signs to formulas; the answer has to stand in what is said.
"""

from __future__ import annotations

from qzoom.data.benchmarks.table import Benchmark, Row, text, texts
from qzoom.data.samples import SampleQuestion

__all__ = ["CHARTQA", "DOCVQA", "INFOVQA", "OCRBENCH", "TEXTVQA"]


def _question(row: Row) -> SampleQuestion:
    kind = "human" if text(row, "type") == "human_test" else "augmented"
    asked = f"{text(row, 'question')}\nAnswer the question with a single word."
    return SampleQuestion(kind, asked, text(row, "answer"), metric="relaxed_accuracy")


CHARTQA = Benchmark("chartqa", "lmms-lab-encoder/ChartQA", None, "test", 16, _question, fields=("human", "augmented"))


def _question_docvqa(row: Row) -> SampleQuestion:
    answers = texts(row, "answers")
    asked = f"{text(row, 'question')}\nAnswer the question using a single word or phrase."
    return SampleQuestion("docvqa", asked, answers[0], answers=answers, metric="anls")


DOCVQA = Benchmark("docvqa", "lmms-lab-encoder/DocVQA", "DocVQA", "validation", 32, _question_docvqa)


def _question_infovqa(row: Row) -> SampleQuestion:
    answers = texts(row, "answers")
    asked = f"{text(row, 'question')}\nAnswer the question using a single word or phrase."
    return SampleQuestion("infovqa", asked, answers[0], answers=answers, metric="anls")


INFOVQA = Benchmark("infovqa", "lmms-lab-encoder/DocVQA", "InfographicVQA", "validation", 32, _question_infovqa)


def _question_textvqa(row: Row) -> SampleQuestion:
    answers = texts(row, "answers")
    asked = f"{text(row, 'question').capitalize()}\nAnswer the question using a single word or phrase."
    most = max(answers, key=answers.count)
    return SampleQuestion("textvqa", asked, most, answers=answers, metric="vqa_accuracy")


TEXTVQA = Benchmark("textvqa", "lmms-lab-encoder/textvqa", None, "validation", 128, _question_textvqa)


_FORMULAS = "HME100k"


def _question_ocrbench(row: Row) -> SampleQuestion:
    answers = texts(row, "answer")
    metric = "contains_formula" if text(row, "dataset") == _FORMULAS else "contains"
    return SampleQuestion(
        text(row, "question_type"), text(row, "question").strip(), answers[0], answers=answers, metric=metric
    )


OCRBENCH = Benchmark("ocrbench", "echo840/OCRBench", None, "test", 128, _question_ocrbench)
