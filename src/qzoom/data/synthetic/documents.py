"""Synthetic documents: receipts, forms and tables, printed, aged like a scan, with questions and boxes.

A sheet has about 600 x 1200 to 1200 x 2400 px; receipts have a module of their own.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from qzoom.data.cells import around
from qzoom.data.synthetic import texts
from qzoom.data.synthetic.page import (
    FontSet,
    Page,
    ScanStyle,
    SyntheticQuestion,
    SyntheticSample,
    TextSpan,
    Writer,
    age,
    span_box,
)
from qzoom.data.synthetic.receipts import PrintedAnswer, print_receipt
from qzoom.data.synthetic.texts import COLOURS, ask

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
    _cut_to_length(page, writer, rng, width)
    stamp = _stamp(page, rng) if rng.random() < 0.2 else None
    style = _scan_style(rng)
    stretch = (float(rng.uniform(0.9, 1.05)), float(rng.uniform(0.92, 1.18))) if rng.random() < 0.5 else (1.0, 1.0)
    page.transform(*stretch, style.angle_deg, paper)
    image = age(page.image, style, rng).convert("RGB")
    wording = rng if reword else None
    questions = [_question(page, answer, wording) for answer in answers]
    questions += _page_questions(kind, stamp, image, wording)
    return SyntheticSample(image, tuple(questions), kind, seed, tuple(page.lines))


def _cut_to_length(page: Page, writer: Writer, rng: np.random.Generator, width: int) -> None:
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


def _question(page: Page, answer: PrintedAnswer, rng: np.random.Generator | None) -> SyntheticQuestion:
    boxes = tuple(around([span_box(page.lines, span) for span in spelling]) for spelling in answer.spellings)
    asked = ask(answer.field, rng, **answer.names)
    return SyntheticQuestion(answer.field, asked, answer.text, boxes, answer.easy, spans=answer.spellings[0])


def _page_questions(
    kind: str, stamp: str | None, image: Image.Image, rng: np.random.Generator | None
) -> list[SyntheticQuestion]:
    """Questions about the page as a whole, which the coarse view can answer."""
    whole = ((0, 0, *image.size),)
    questions = [
        SyntheticQuestion("kind", ask("kind", rng), kind, whole, True),
        SyntheticQuestion("stamp", ask("stamp", rng), "yes" if stamp else "no", whole if stamp else (), True),
    ]
    if stamp:
        questions.append(SyntheticQuestion("stamp_colour", ask("stamp_colour", rng), stamp, whole, True))
    return questions


_HEADINGS = texts.phrases(
    "INVOICE|ORDER FORM|APPLICATION|STATEMENT|DELIVERY NOTE|QUOTATION|MEMBER CARD|WORK ORDER|PURCHASE ORDER|"
    "REGISTRATION|CERTIFICATE|TIME SHEET|PACKING LIST|CREDIT NOTE"
)
_TABLE_HEADINGS = texts.phrases("PRICE LIST|STOCK REPORT|TIMETABLE|SALES REPORT|INVENTORY|RESULTS|SCHEDULE|SUMMARY")
_COLUMNS = ("Price", "Qty", "Code", "Stock", "Date", "Amount", "Ref", "Weight", "Rate", "Score")
_FOOTER = "This document is computer generated and no signature is required."


def print_form(writer: Writer, rng: np.random.Generator) -> list[PrintedAnswer]:
    """A heading, a company, ten to eighteen labelled fields in one or two blocks, small print at the bottom."""
    heading = str(rng.choice(_HEADINGS))
    line = writer.text(
        heading, align=str(rng.choice(["left", "center"])), size=int(writer.size * rng.uniform(2.2, 3.4)), bold=True
    )
    answers = [PrintedAnswer("heading", heading, [(TextSpan(line, 0, len(heading)),)], easy=True)]
    writer.skip(0.5)
    company = texts.company(rng)
    line = writer.text(company, size=int(writer.size * 1.2), bold=bool(rng.random() < 0.5))
    answers.append(PrintedAnswer("company", company, [(TextSpan(line, 0, len(company)),)]))
    style = str(rng.choice(["inline", "tab", "tab", "right"]))
    colon = str(rng.choice(["", ":", " :"]))
    names = [texts.LABELS[int(i)] for i in rng.permutation(len(texts.LABELS))[: int(rng.integers(9, 17))]]
    for needed in ("Date", "Total", "Customer"):
        if needed not in names:
            names.insert(int(rng.integers(len(names))), needed)
    writer.skip(0.7)
    for index, name in enumerate(names):
        if index and rng.random() < 0.15:
            writer.rule(str(rng.choice(["line", "none"])))
        writer.skip(float(rng.uniform(0.1, 0.8)))
        value = texts.field_value(rng, name)
        span = writer.labelled(name + colon, value, style)
        answers.append(_field(name, texts.bare_amount(value), span))
    writer.skip(1.5)
    writer.text(_FOOTER, size=max(11, int(writer.size * 0.7)))
    return answers


def _field(name: str, value: str, span: TextSpan) -> PrintedAnswer:
    """The answer of a labelled field (at the end of `span`); common fields have questions of their own."""
    span = TextSpan(span.line, span.stop - len(value), span.stop)
    kinds = {"Date": "date", "Total": "total", "Customer": "customer", "Time": "time", "Phone": "phone", "Cash": "cash",
             "Change": "change", "Subtotal": "subtotal", "Tax": "tax"}  # fmt: skip
    if name in kinds:
        return PrintedAnswer(kinds[name], value, [(span,)])
    numbers = {"Invoice No": "invoice", "Bill No": "bill", "Receipt No": "receipt", "Order No": "order"}
    if name in numbers:
        return PrintedAnswer("number", value, [(span,)], {"name": numbers[name]})
    return PrintedAnswer("value", value, [(span,)], {"name": name.lower()})


def print_table(writer: Writer, rng: np.random.Generator) -> list[PrintedAnswer]:
    """A heading and a ruled table of 8 to 20 items with two or three columns of numbers."""
    heading = str(rng.choice(_TABLE_HEADINGS))
    line = writer.text(heading, align="center", size=int(writer.size * rng.uniform(2.0, 3.0)), bold=True)
    answers = [PrintedAnswer("heading", heading, [(TextSpan(line, 0, len(heading)),)], easy=True)]
    writer.skip(1.0)
    columns = [str(c) for c in rng.choice(_COLUMNS, size=int(rng.integers(2, 4)), replace=False)]
    stops = [0.0, *np.linspace(0.55, 1.0, len(columns)).tolist()]
    top = writer.y
    writer.cells(
        [(0.0, "left", "Item"), *((stop, "right", name) for stop, name in zip(stops[1:], columns, strict=True))],
        bold=True,
    )
    grid = rng.random() < 0.6
    names = list(dict.fromkeys(texts.item_name(rng) for _ in range(int(rng.integers(8, 21)))))
    for name in sorted(names, key=lambda _: rng.random()):
        if grid:
            writer.page.draw.line([(writer.margin, writer.y), (writer.right, writer.y)], fill=writer.ink, width=1)
        writer.skip(0.2)
        values = [texts.field_value(rng, column) for column in columns]
        cells = [(0.0, "left", name), *((stop, "right", value) for stop, value in zip(stops[1:], values, strict=True))]
        lines = writer.cells(cells)
        writer.skip(0.2)
        for column, value, index in zip(columns, values, lines[1:], strict=True):
            answer = texts.bare_amount(value)
            span = TextSpan(index, len(value) - len(answer), len(value))
            if column == "Price":
                answers.append(PrintedAnswer("price", answer, [(span,)], {"name": name}))
            else:
                answers.append(PrintedAnswer("cell", answer, [(span,)], {"name": name, "column": column.lower()}))
    if grid:
        box = [writer.margin - 4, top - 4, writer.right + 4, writer.y + 2]
        writer.page.draw.rectangle(box, outline=writer.ink, width=2)
    return answers
