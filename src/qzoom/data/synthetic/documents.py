"""Documents from a seed: receipts, forms and tables, printed, aged and turned into questions with boxes.

About 600 x 1200 to 1200 x 2400 px. `render_document` is the only entry; the layouts live in files of their own.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from qzoom.data.synthetic.fonts import FontSet
from qzoom.data.synthetic.forms import print_form, print_table
from qzoom.data.synthetic.page import Page, ScanStyle, age, spans_boxes
from qzoom.data.synthetic.receipts import Answer, print_receipt
from qzoom.data.synthetic.records import SyntheticQuestion, SyntheticSample
from qzoom.data.synthetic.wording import COLOURS, ask
from qzoom.data.synthetic.writer import Writer

__all__ = ["DOCUMENT_KINDS", "render_document"]

DOCUMENT_KINDS = ("receipt", "form", "table")
_SHARES = (0.6, 0.22, 0.18)
_TALLEST_PX = 2600


def render_document(
    seed: int, *, kind: str | None = None, font_set: FontSet = "core", reword: bool = True
) -> SyntheticSample:
    """The document of a seed. `kind` fixes the layout (else drawn); `reword` varies the wording of the questions."""
    rng = np.random.default_rng([seed, 23])
    drawn = str(rng.choice(DOCUMENT_KINDS, p=_SHARES))
    kind = kind or drawn
    width = int(rng.integers(600, 901)) if kind == "receipt" else int(rng.integers(800, 1201))
    paper = int(rng.integers(215, 256))
    page = Page(width, _TALLEST_PX, paper)
    per_line = rng.uniform(26, 44) if kind == "receipt" else rng.uniform(44, 66)
    size = max(14, int(width / per_line * 1.15))
    writer = Writer(page, rng, font_set, size, float(rng.uniform(0.03, 0.12)) * width)
    writer.y = float(rng.uniform(0.02, 0.12)) * width
    layout = {"receipt": print_receipt, "form": print_form, "table": print_table}[kind]
    answers = layout(writer, rng)
    _cut_to_length(page, writer, rng, paper, width)
    stamp = _stamp(page, rng) if rng.random() < 0.2 else None
    style = _scan_style(rng)
    stretch = (float(rng.uniform(0.9, 1.05)), float(rng.uniform(0.92, 1.18))) if rng.random() < 0.5 else (1.0, 1.0)
    page.transform(*stretch, style.angle_deg, paper)
    image = age(page.image, style, rng).convert("RGB")
    wording = rng if reword else None
    questions = [_question(page, answer, wording) for answer in answers]
    questions += _page_questions(kind, stamp, image, wording)
    return SyntheticSample(image, tuple(questions), kind, seed, tuple(page.lines))


def _cut_to_length(page: Page, writer: Writer, rng: np.random.Generator, paper: int, width: int) -> None:
    """Cut the sheet below the last line, never shorter than 1.3 times its width, sometimes with blank paper."""
    blank = rng.uniform(0.02, 0.1) if rng.random() < 0.8 else rng.uniform(0.2, 0.6)
    length = int(max(writer.y + blank * width, 1.3 * width))
    page.image = page.image.crop((0, 0, width, min(length, _TALLEST_PX)))
    page.draw = ImageDraw.Draw(page.image)


def _scan_style(rng: np.random.Generator) -> ScanStyle:
    clean = rng.random() < 0.3
    return ScanStyle(
        angle_deg=0.0 if rng.random() < 0.4 else float(rng.uniform(-1.6, 1.6)),
        blur_px=float(rng.choice([0.0, 0.0, 0.6, 1.0])),
        noise=0.0 if clean else float(rng.uniform(0, 12)),
        shade=0.0 if clean else float(rng.uniform(0, 40)),
        fade=float(rng.uniform(0, 0.35)),
        erosion=0.0 if clean else float(rng.choice([0.0, 0.0, 0.02, 0.05])),
    )


def _stamp(page: Page, rng: np.random.Generator) -> str:
    """Press a round or square outline stamp over the sheet; returns its colour's name."""
    name = str(rng.choice(["red", "blue", "purple", "green"]))
    page.image = page.image.convert("RGB") if page.image.mode == "L" else page.image
    width, height = page.image.size
    side = int(rng.uniform(0.14, 0.26) * width)
    layer = Image.new("L", page.image.size, 0)
    draw = ImageDraw.Draw(layer)
    x, y = int(rng.uniform(0.05, 0.7) * width), int(rng.uniform(0.3, 0.85) * (height - side))
    shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
    shape([x, y, x + side, y + int(side * rng.uniform(0.5, 1.0))], outline=150, width=max(3, side // 22))
    shape([x + side // 6, y + side // 8, x + side - side // 6, y + side // 2], outline=150, width=max(2, side // 40))
    page.image.paste(Image.new("RGB", page.image.size, COLOURS[name]), mask=layer)
    page.draw = ImageDraw.Draw(page.image)
    return name


def _question(page: Page, answer: Answer, rng: np.random.Generator | None) -> SyntheticQuestion:
    boxes = tuple(_union(spans_boxes(page.lines, spelling)) for spelling in answer.spellings)
    return SyntheticQuestion(
        answer.field, ask(answer.field, rng, **answer.names), answer.text, boxes, answer.easy, answer.spellings[0]
    )


def _union(boxes: tuple[tuple[int, int, int, int], ...]) -> tuple[int, int, int, int]:
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def _page_questions(
    kind: str, stamp: str | None, image: Image.Image, rng: np.random.Generator | None
) -> list[SyntheticQuestion]:
    """Questions about the page as a whole, which the coarse look can answer."""
    whole = ((0, 0, *image.size),)
    questions = [
        SyntheticQuestion("kind", ask("kind", rng), kind, whole, True),
        SyntheticQuestion("stamp", ask("stamp", rng), "yes" if stamp else "no", whole if stamp else (), True),
    ]
    if stamp:
        questions.append(SyntheticQuestion("stamp_colour", ask("stamp_colour", rng), stamp, whole, True))
    return questions
