"""Strips: a few printed lines on a small picture, the reading exercise that everything else builds on.

Either one to three free lines ("what does line 2 say?") or label-and-value rows as forms and receipts have them
("what is the invoice no?").
"""

from __future__ import annotations

import numpy as np

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.fonts import FontSet, font_paths, load_font
from qzoom.data.synthetic.page import Page, ScanStyle, age, span_box
from qzoom.data.synthetic.records import SyntheticQuestion, SyntheticSample, TextSpan
from qzoom.data.synthetic.wording import ask

__all__ = ["render_strip"]


def render_strip(
    seed: int,
    *,
    width_px: int = 256,
    height_px: int = 64,
    max_lines: int = 3,
    rows_share: float = 0.5,
    font_set: FontSet = "core",
) -> SyntheticSample:
    """The strip of a seed: `rows_share` of them hold label-and-value rows, the others free lines."""
    rng = np.random.default_rng([seed, 11])
    paper = int(rng.integers(200, 256))
    page = Page(width_px, height_px, paper)
    ink = int(rng.integers(0, 90))
    paths = font_paths(font_set)
    path = paths[int(rng.integers(len(paths)))]
    count = int(rng.integers(1, max_lines + 1))
    pitch = height_px / count
    size = int(np.clip(rng.uniform(0.5, 0.85) * pitch, 9, 46))
    questions = (
        _rows(page, rng, path, size, count, ink)
        if rng.random() < rows_share
        else _free(page, rng, path, size, count, ink)
    )
    style = ScanStyle(
        blur_px=float(rng.choice([0.0, 0.0, 0.5, 0.8])),
        noise=float(rng.uniform(0, 14)),
        fade=float(rng.uniform(0, 0.35)),
        erosion=float(rng.choice([0.0, 0.0, 0.02, 0.06])),
    )
    return SyntheticSample(
        age(page.image, style, rng).convert("RGB"), tuple(questions), "strip", seed, tuple(page.lines)
    )


def _fit(path: str, size: int, text: str, room: float) -> int:
    """The largest size up to `size` at which the text fits into `room` pixels (never below 8)."""
    wide = load_font(path, size).getlength(text)
    return size if wide <= room else max(8, int(size * room / wide))


def _free(page: Page, rng: np.random.Generator, path: str, size: int, count: int, ink: int) -> list[SyntheticQuestion]:
    width, height = page.image.size
    questions = []
    for number in range(count):
        text = texts.random_text(rng)
        fitted = _fit(path, size, text, width - 4)
        free = max(1.0, width - 4 - load_font(path, fitted).getlength(text))
        top = (number + rng.uniform(0.05, 0.2)) * height / count - 0.1 * fitted
        line = page.print(2 + rng.uniform(0, free), max(0.0, top), text, path, fitted, fill=ink)
        span = TextSpan(line, 0, len(text))
        asked = ask("text", rng) if count == 1 else ask("line", rng, n=str(number + 1))
        questions.append(SyntheticQuestion("text", asked, text, (span_box(page.lines, span),), False, (span,)))
    return questions


def _rows(page: Page, rng: np.random.Generator, path: str, size: int, count: int, ink: int) -> list[SyntheticQuestion]:
    width, height = page.image.size
    names = [texts.LABELS[i] for i in rng.choice(len(texts.LABELS), size=count, replace=False)]
    mark = str(rng.choice(["", ":", " :", ": "]))
    right = bool(rng.random() < 0.5)
    capitals = bool(rng.random() < 0.4)
    questions = []
    for number, name in enumerate(names):
        value = texts.field_value(rng, name)
        shown = (name.upper() if capitals else name) + mark
        fitted = min(_fit(path, size, shown + "  " + value, width - 6), size)
        top = max(0.0, (number + rng.uniform(0.08, 0.15)) * height / count - 0.1 * fitted)
        left = 2 + rng.uniform(0, 8)
        page.print(left, top, shown, path, fitted, fill=ink)
        after = left + load_font(path, fitted).getlength(shown + " ")
        if right:
            line = page.print(width - 3, top, value, path, fitted, fill=ink, align="right")
        else:
            line = page.print(after + rng.uniform(0, 4), top, value, path, fitted, fill=ink)
        answer = texts.bare_amount(value)
        span = TextSpan(line, len(value) - len(answer), len(value))
        asked = ask("value", rng, name=name.lower())
        questions.append(SyntheticQuestion(name.lower(), asked, answer, (span_box(page.lines, span),), False, (span,)))
    return questions
