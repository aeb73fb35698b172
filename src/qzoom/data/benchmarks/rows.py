"""How the rows of benchmarks become questions: multiple choice, then free answers.

hrbench4k, hrbench8k   every question with its options in four orders, all of which count equally
vstar                  small objects in large photographs; the options are part of the question's text
mme_realworld_lite     perception and reasoning on large real images, five options each
chartqa                questions written by people ("human") and generated ones ("augmented"); numbers within 5 %
docvqa                 scanned pages, a short text from the page; ANLS
infovqa                long infographics, a short text or a number derived from them; ANLS
textvqa                photographs with text, ten annotators' answers each; prompt as lmms-eval's, with its lower case
ocrbench               five kinds of reading, from signs to formulas; the prediction must contain the answer
"""

from __future__ import annotations

import re
from functools import partial

from qzoom.data.benchmarks.table import Benchmark, Row, option_letter, optional_text, text, texts
from qzoom.data.samples import SampleQuestion
from qzoom.errors import DataError
from qzoom.scoring.letters import LETTERS

_OPTION = re.compile(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)")
_LABEL = re.compile(r"^\s*\([A-Z]\)\s*")


def _hrbench(row: Row) -> SampleQuestion:
    given = {letter: optional_text(row, letter) for letter in LETTERS}
    options = {letter: option for letter, option in given.items() if option is not None}
    if "".join(options) != LETTERS[: len(options)] or not options:
        raise DataError("the options must fill the columns A, B, C and so on without a gap.")
    listed = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    prompt = f"{text(row, 'question').strip()}\n{listed}Answer the option letter directly."
    return SampleQuestion(
        text(row, "category"),
        prompt,
        option_letter(row, "answer", len(options)),
        choices=tuple(options.values()),
        metric="choice_hrbench",
    )


def _vstar(row: Row) -> SampleQuestion:
    given = text(row, "text")
    choices = tuple(option.strip() for option in _OPTION.findall(given))[:4]
    prompt = given
    if choices:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        prompt = "\n".join([given.split("(A)")[0].strip(), *lines])
    prompt += "\nAnswer with the option's letter from the given choices directly."
    label = option_letter(row, "label", 4)
    return SampleQuestion(
        optional_text(row, "category") or "unknown",
        prompt,
        label,
        choices=choices or tuple("ABCD"),
        metric="choice_vstar",
    )


def _mme(row: Row) -> SampleQuestion:
    options = texts(row, "multi-choice options")
    kind = "perception" if "perception" in text(row, "category").lower() else "reasoning"
    listed = "\n".join(options)
    prompt = (
        f"{text(row, 'question')} The choices are listed below:\n{listed}\n"
        "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
        "(A, B, C, D, or E) of the correct option.\nThe best answer is: "
    )
    choices = tuple(_LABEL.sub("", option) for option in options)
    return SampleQuestion(
        kind, prompt, option_letter(row, "answer", len(options)), choices=choices, metric="choice_mme"
    )


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


_infovqa = partial(_docvqa, field="infovqa")
_HR = ("DreamMr/HR-Bench", "hrbench_version_split")
_MME = "yifanzhang114/MME-RealWorld-lite-lmms-eval"
TABLES = (
    Benchmark("textvqa", "lmms-lab-encoder/textvqa", None, "validation", 128, _textvqa),
    Benchmark("infovqa", "lmms-lab-encoder/DocVQA", "InfographicVQA", "validation", 32, _infovqa),
    Benchmark("chartqa", "lmms-lab-encoder/ChartQA", None, "test", 16, _chartqa, fields=("human", "augmented")),
    Benchmark("ocrbench", "echo840/OCRBench", None, "test", 128, _ocrbench),
    Benchmark("docvqa", "lmms-lab-encoder/DocVQA", "DocVQA", "validation", 32, _docvqa),
    Benchmark("vstar", "lmms-lab-encoder/vstar-bench", None, "test", 16, _vstar),
    Benchmark("mme_realworld_lite", _MME, None, "train", 16, _mme, picture="bytes", fields=("perception", "reasoning")),
    Benchmark("hrbench4k", *_HR, "hrbench_4k", 128, _hrbench, fields=("single", "cross")),
    Benchmark("hrbench8k", *_HR, "hrbench_8k", 128, _hrbench, fields=("single", "cross")),
)
