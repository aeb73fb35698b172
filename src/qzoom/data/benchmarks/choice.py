"""Multiple-choice benchmarks: how their rows become questions.

hrbench4k, hrbench8k   every question with its options in four orders, all of which count equally
vstar                  small objects in large photographs; the options are part of the question's text
mme_realworld_lite     perception and reasoning on large real images, five options each
"""

from __future__ import annotations

import re

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


def _mme_realworld_lite(row: Row) -> SampleQuestion:
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


MME_REALWORLD_LITE = Benchmark(
    "mme_realworld_lite",
    "yifanzhang114/MME-RealWorld-lite-lmms-eval",
    None,
    "train",
    16,
    _mme_realworld_lite,
    picture="bytes",
    fields=("perception", "reasoning"),
)
HRBENCH_4K = Benchmark(
    "hrbench4k", "DreamMr/HR-Bench", "hrbench_version_split", "hrbench_4k", 128, _hrbench, fields=("single", "cross")
)
HRBENCH_8K = Benchmark(
    "hrbench8k", "DreamMr/HR-Bench", "hrbench_version_split", "hrbench_8k", 128, _hrbench, fields=("single", "cross")
)
VSTAR = Benchmark("vstar", "lmms-lab-encoder/vstar-bench", None, "test", 16, _vstar)
