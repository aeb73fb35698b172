"""Forms, invoices and tables on larger sheets: headed label-and-value blocks, and ruled grids with named columns."""

from __future__ import annotations

import numpy as np

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.receipts import Answer
from qzoom.data.synthetic.records import TextSpan
from qzoom.data.synthetic.writer import Writer

__all__ = ["print_form", "print_table"]

_HEADINGS = (
    "INVOICE",
    "ORDER FORM",
    "APPLICATION",
    "STATEMENT",
    "DELIVERY NOTE",
    "QUOTATION",
    "MEMBER CARD",
    "WORK ORDER",
    "PURCHASE ORDER",
    "REGISTRATION",
    "CERTIFICATE",
    "TIME SHEET",
    "PACKING LIST",
    "CREDIT NOTE",
)
_TABLE_HEADINGS = (
    "PRICE LIST",
    "STOCK REPORT",
    "TIMETABLE",
    "SALES REPORT",
    "INVENTORY",
    "RESULTS",
    "SCHEDULE",
    "SUMMARY",
)
_COLUMNS = ("Price", "Qty", "Code", "Stock", "Date", "Amount", "Ref", "Weight", "Rate", "Score")
_FOOTER = "This document is computer generated and no signature is required."


def print_form(writer: Writer, rng: np.random.Generator) -> list[Answer]:
    """A heading, a company, ten to eighteen labelled fields in one or two blocks, small print at the bottom."""
    heading = str(rng.choice(_HEADINGS))
    line = writer.text(
        heading, align=str(rng.choice(["left", "center"])), size=int(writer.size * rng.uniform(2.2, 3.4)), bold=True
    )
    answers = [Answer("heading", heading, [(TextSpan(line, 0, len(heading)),)], easy=True)]
    writer.skip(0.5)
    company = texts.company(rng)
    line = writer.text(company, size=int(writer.size * 1.2), bold=bool(rng.random() < 0.5))
    answers.append(Answer("company", company, [(TextSpan(line, 0, len(company)),)]))
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


def _field(name: str, value: str, span: TextSpan) -> Answer:
    """The answer of a labelled field (at the end of `span`); common fields have questions of their own."""
    span = TextSpan(span.line, span.stop - len(value), span.stop)
    kinds = {"Date": "date", "Total": "total", "Customer": "customer", "Time": "time", "Phone": "phone", "Cash": "cash",
             "Change": "change", "Subtotal": "subtotal", "Tax": "tax"}  # fmt: skip
    if name in kinds:
        return Answer(kinds[name], value, [(span,)])
    numbers = {"Invoice No": "invoice", "Bill No": "bill", "Receipt No": "receipt", "Order No": "order"}
    if name in numbers:
        return Answer("number", value, [(span,)], {"name": numbers[name]})
    return Answer("value", value, [(span,)], {"name": name.lower()})


def print_table(writer: Writer, rng: np.random.Generator) -> list[Answer]:
    """A heading and a ruled table of 8 to 20 items with two or three columns of numbers."""
    heading = str(rng.choice(_TABLE_HEADINGS))
    line = writer.text(heading, align="center", size=int(writer.size * rng.uniform(2.0, 3.0)), bold=True)
    answers = [Answer("heading", heading, [(TextSpan(line, 0, len(heading)),)], easy=True)]
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
                answers.append(Answer("price", answer, [(span,)], {"name": name}))
            else:
                answers.append(Answer("cell", answer, [(span,)], {"name": name, "column": column.lower()}))
    if grid:
        box = [writer.margin - 4, top - 4, writer.right + 4, writer.y + 2]
        writer.page.draw.rectangle(box, outline=writer.ink, width=2)
    return answers
