"""Real lines whose letters change places, so that what is printed can only be read, not remembered.

The real receipts hold seven thousand different lines, and a decoder that spells soon knows them: it completes words
that it has met and misreads those that it has not. Here the letters of a line, and its digits, are cut out where every
character stands alone, and set again in another order. Print, paper, sizes and gaps stay real; the word is new.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tiny.pack import PackedLine, Page
from tiny.receipt_data import only_line, paper_grey, target_text

_INK_PERCENTILE = 2
_INK_SHARE = 0.4
"""A column holds ink where its darkest pixel is this far from paper to the line's darkest print."""
_EDGE_PX = 1
"""How far the grey edge of a character reaches beyond its ink."""
_WIDEST = 2.0
"""No character is this many times as wide as the line's median; what is so wide is two that touch."""


def respell(page: Page, rng: np.random.Generator) -> Page:
    """The page with letters and digits of its lines in another order, for exercises that read lines.

    A line whose characters cannot be told apart (touching or broken print) stays as it is. The page's questions are
    left out: their answers and the words they ask about may be among what changed.
    """
    pixels, lines = page.pixels.copy(), list(page.lines)
    for index, line in enumerate(lines):
        text = respell_line(pixels, line, rng)
        lines[index] = PackedLine(text, line.box) if text != line.text else line
    return dataclasses.replace(page, pixels=pixels, lines=tuple(lines), questions=())


def respell_company(page: Page, rng: np.random.Generator) -> Page:
    """The page with the letters of the company's name in another order, where one line shows the name and no more."""
    index = only_line(page, "company")
    name = next((q.answer for q in page.questions if q.field == "company"), None)
    if index is None or target_text("company", page.lines[index].text) != name:
        return page
    pixels, lines = page.pixels.copy(), list(page.lines)
    text = respell_line(pixels, lines[index], rng)
    lines[index] = PackedLine(text, lines[index].box)
    answer = target_text("company", text)
    questions = tuple(dataclasses.replace(q, answer=answer) if q.field == "company" else q for q in page.questions)
    return dataclasses.replace(page, pixels=pixels, lines=tuple(lines), questions=questions)


def respell_line(pixels: np.ndarray, line: PackedLine, rng: np.random.Generator) -> str:
    """Set a line's letters and digits in another order in grey `pixels`, (h, w) uint8; returns its text from now on."""
    x0, y0, x1, y1 = line.box
    crop = pixels[y0:y1, x0:x1]
    characters = [c for c in line.text if not c.isspace()]
    if len(characters) < 2 or not crop.size:
        return line.text
    paper, ink = paper_grey(crop), float(np.percentile(crop, _INK_PERCENTILE))
    spans = _characters(crop.min(axis=0) < paper - _INK_SHARE * (paper - ink), line.text)
    if spans is None:
        return line.text
    order = _order(characters, rng)
    _set(crop, spans, order, paper)
    letters = iter(order)
    return "".join(c if c.isspace() else characters[next(letters)] for c in line.text)


def _characters(inked: np.ndarray, text: str) -> np.ndarray | None:
    """Start and end (n, 2) of each character that is not blank; None where they cannot be told apart."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inked.astype(np.int8), [0]))))
    spans = edges.reshape(-1, 2)
    words = text.split()
    if len(spans) != sum(map(len, words)):
        return None
    widths, gaps = spans[:, 1] - spans[:, 0], spans[1:, 0] - spans[:-1, 1]
    if widths.max() > _WIDEST * np.median(widths):
        return None
    between = np.cumsum([len(word) for word in words])[:-1] - 1
    inside = np.delete(gaps, between)
    if len(between) and len(inside) and gaps[between].min() <= inside.max():
        return None
    return spans


def _order(characters: list[str], rng: np.random.Generator) -> list[int]:
    """Which character stands at each place: letters change with letters, digits with digits."""
    order = np.arange(len(characters))
    for kind in (str.isalpha, str.isdigit):
        places = np.array([i for i, c in enumerate(characters) if kind(c)], dtype=int)
        order[places] = rng.permutation(places)
    return order.tolist()


def _set(crop: np.ndarray, spans: np.ndarray, order: list[int], paper: float) -> None:
    """Print the characters anew in `crop`, in that order and with the gaps of before."""
    gaps = np.append(spans[1:, 0] - spans[:-1, 1], 0)
    before = crop.copy()
    crop[:] = int(paper)
    place = int(spans[0, 0])
    for number, gap in zip(order, gaps, strict=True):
        start, stop = map(int, spans[number])
        left, right = max(0, start - _EDGE_PX), min(before.shape[1], stop + _EDGE_PX)
        at = place - (start - left)
        at = min(max(0, at), before.shape[1] - (right - left))
        target = crop[:, at : at + right - left]
        np.minimum(target, before[:, left:right], out=target)
        place += stop - start + int(gap)
