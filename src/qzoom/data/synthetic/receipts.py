"""Synthetic shop receipts as thermal printers print them: header, details, items, totals, tax summary, thanks.

The layout varies in order, labels, font, alignment, separators, and in which totals are printed and how often. Answers
are recorded while printing, so each has the boxes of its characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.page import TextSpan, Writer

_TITLES = texts.phrases(
    "TAX INVOICE|Tax Invoice|RECEIPT|CASH RECEIPT|INVOICE|SIMPLIFIED TAX INVOICE|-TAX INVOICE-|CASH SALES|"
    "CASH BILL|*** RECEIPT ***"
)
_NUMBER_LABELS = {
    "invoice": ("Invoice No", "INV No.", "Inv No", "INVOICE NO.", "Invoice #", "Inv#", "Invoice"),
    "receipt": ("Receipt No", "RECEIPT #", "Receipt", "Rcpt No.", "Receipt #"),
    "bill": ("Bill No", "BILL NO.", "Bill#", "Bill"),
    "document": ("Doc No", "Document No", "DOC NO."),
    "order": ("Order No", "ORDER #", "Order", "ORD #"),
}
_DATE_LABELS = ("Date", "DATE", "Date :", "Date:", "Dt", "Date/Time", "Invoice Date", "Trx Date", "")
_TOTAL_LABELS = texts.phrases(
    "TOTAL|Total|Total Amount|TOTAL RM|Total RM|TOTAL (RM)|GRAND TOTAL|Grand Total|Net Total|NET TOTAL|"
    "Total Sales Inclusive GST|Total Incl. GST|Total (Inclusive of GST)|TOTAL INCL GST|Nett Total|Amount Due|"
    "Total Payable|TOTAL DUE|Total Rounded|TOTAL AMOUNT|Total Sales (Inclusive of GST)"
)
_SUBTOTAL_LABELS = texts.phrases(
    "Subtotal|SUB TOTAL|Sub-Total|SUBTOTAL|Total (Excluding GST)|Total Excl. GST|Sub Total"
)
_TAX_LABELS = ("GST 6%", "Total GST", "GST", "TAX 6%", "GST Amount", "Tax", "SST 6%", "Service Tax 6%")
_CASH_LABELS = ("CASH", "Cash", "Cash Received", "PAID", "Cash Tendered", "Payment", "VISA", "Paid Amount")
_CHANGE_LABELS = ("CHANGE", "Change", "Change Due", "CHANGE DUE", "Balance")
_THANKS = texts.phrases(
    "THANK YOU|PLEASE COME AGAIN|Thank You. Please Come Again|GOODS SOLD ARE NOT RETURNABLE|"
    "Terima Kasih. Sila Datang Lagi|Have a nice day|Goods Sold Are Not Refundable|EXCHANGE ARE ALLOWED WITHIN|"
    "7 DAYS WITH RECEIPT.|STRICTLY NO CASH REFUND.|Closed on Sunday|Visit us online|Powered by POS"
)
_PLACES = texts.phrases(
    "CHERAS|PETALING JAYA|KUALA LUMPUR|SELANGOR|JOHOR BAHRU|SHAH ALAM|KLANG|PENANG|IPOH|SEREMBAN|KAJANG|PUCHONG|"
    "SUBANG JAYA|SETAPAK|AMPANG|SEMENYIH"
)


@dataclass(slots=True)
class PrintedAnswer:
    """An answer while the page is made: `spellings` are all places where it is printed, each a tuple of spans."""

    field: str
    text: str
    spellings: list[tuple[TextSpan, ...]] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    easy: bool = False


@dataclass(slots=True)
class _Style:
    """Choices that hold for a whole receipt."""

    align: str
    rule: str
    meta: str
    totals: str
    colon: str
    currency: str
    upper: bool


def _one(rng: np.random.Generator, items: tuple[str, ...]) -> str:
    return items[int(rng.integers(len(items)))]


def print_receipt(writer: Writer, rng: np.random.Generator) -> list[PrintedAnswer]:
    """Print a receipt from the writer's position; the page must be long enough (about 60 lines)."""
    style = _Style(
        align="center" if rng.random() < 0.8 else "left",
        rule=_one(rng, ("dash", "dash", "equal", "line", "line", "none", "star")),
        meta=_one(rng, ("inline", "inline", "tab", "tab", "right")),
        totals=_one(rng, ("right", "right", "right", "mid", "tab")),
        colon=_one(rng, ("", ":", " :", ":")),
        currency=_one(rng, ("", "", "", "RM", "RM ", "$")),
        upper=bool(rng.random() < 0.5),
    )
    answers = [_header(writer, rng, style)]
    writer.skip(float(rng.uniform(0.2, 1.0)))
    titled = rng.random() < 0.75
    if titled and rng.random() < 0.5:
        _title(writer, rng, style)
        titled = False
    late_date = bool(rng.random() < 0.15)
    answers += _meta(writer, rng, style, with_date=not late_date)
    if titled:
        _title(writer, rng, style)
    writer.rule(style.rule)
    item_answers, value = _items(writer, rng, style)
    writer.rule(style.rule)
    answers += item_answers + _totals(writer, rng, style, value)
    if late_date:
        writer.rule(style.rule)
        answers += _date_line(writer, rng, style)
    if rng.random() < 0.4:
        _tax_summary(writer, rng, value)
    writer.skip(float(rng.uniform(0.3, 1.5)))
    for _ in range(int(rng.integers(1, 5))):
        writer.text(_one(rng, _THANKS), align=style.align)
    return answers


def _title(writer: Writer, rng: np.random.Generator, style: _Style) -> None:
    title, bold = _one(rng, _TITLES), bool(rng.random() < 0.6)
    writer.text(title, align=style.align, bold=bold, size=int(writer.size * rng.uniform(1, 1.4)))


def _header(writer: Writer, rng: np.random.Generator, style: _Style) -> PrintedAnswer:
    name = texts.company(rng)
    shown = name if rng.random() < 0.8 else name.title()
    size = int(writer.size * rng.choice([1.0, 1.0, 1.15, 1.35, 1.7]))
    bold = bool(rng.random() < 0.5)
    words = shown.split(" ")
    if (len(shown) > 26 and rng.random() < 0.6) and len(words) > 2:
        cut = len(words) - 2
        pieces = [" ".join(words[:cut]), " ".join(words[cut:])]
    else:
        pieces = [shown]
    if rng.random() < 0.1:
        writer.text(texts.random_text(rng), align=style.align)
    spans = []
    for piece in pieces:
        line = writer.text(piece, align=style.align, size=size, bold=bold)
        spans.append(TextSpan(line, 0, len(piece)))
    if rng.random() < 0.6:
        writer.text(f"({rng.integers(10000, 999999)}-{_one(rng, tuple('WXUVTMHK'))})", align=style.align)
    for text in _address(rng):
        writer.text(text if rng.random() < 0.7 else text.upper(), align=style.align)
    if rng.random() < 0.6:
        writer.text(f"TEL: {texts.phone(rng)}", align=style.align)
    if rng.random() < 0.6:
        writer.text(
            f"{_one(rng, ('GST ID: ', 'GST REG NO: ', 'GST No. ', '(GST ID No: '))}{rng.integers(10**11, 10**12)}",
            align=style.align,
        )
    return PrintedAnswer("company", name.upper(), [tuple(spans)], easy=size > 1.3 * writer.size)


def _address(rng: np.random.Generator) -> list[str]:
    lines = [
        f"NO {rng.integers(1, 400)}, JALAN {texts.person(rng).split()[0]} {rng.integers(1, 40)}/{rng.integers(1, 30)},"
    ]
    if rng.random() < 0.5:
        lines.append(f"TAMAN {texts.item_name(rng)},")
    lines.append(f"{rng.integers(10000, 99999)} {_one(rng, _PLACES)}{_one(rng, ('', ', SELANGOR', ', JOHOR'))}.")
    return lines


def _meta(writer: Writer, rng: np.random.Generator, style: _Style, *, with_date: bool) -> list[PrintedAnswer]:
    answers: list[PrintedAnswer] = []
    kind = _one(rng, tuple(_NUMBER_LABELS))
    number = texts.code(rng, 4, 10)

    def labelled(labels: tuple[str, ...], value: Callable[[], str], field: str, name: str) -> None:
        label = _one(rng, labels) + style.colon
        text = value()
        answers.append(PrintedAnswer(field, text, [(writer.labelled(label, text, style.meta),)], {"name": name}))

    def numbered() -> None:
        labelled(_NUMBER_LABELS[kind], lambda: number, "number", kind)

    def dated() -> None:
        answers.extend(_date_line(writer, rng, style))

    def cashier() -> None:
        labelled(("Cashier", "CASHIER", "Served by", "Staff"), lambda: texts.person(rng), "value", "cashier")

    def table() -> None:
        labelled(("Table", "TABLE", "Table No"), lambda: str(rng.integers(1, 60)), "value", "table")

    parts = [numbered, *([dated] if with_date else [])]
    parts += [part for part, chance in ((cashier, 0.5), (table, 0.3)) if rng.random() < chance]
    for index in rng.permutation(len(parts)):
        parts[int(index)]()
    return answers


def _date_line(writer: Writer, rng: np.random.Generator, style: _Style) -> list[PrintedAnswer]:
    """The date, with or without a label, often with the time behind it."""
    day, clock = texts.date(rng), texts.time(rng)
    label = _one(rng, _DATE_LABELS)
    if label and not label.endswith(":"):
        label += style.colon
    joined = rng.random() < 0.6
    shown = f"{day}{_one(rng, (' ', '  ', ' '))}{clock}" if joined else day
    if label:
        span = writer.labelled(label, shown, style.meta)
    else:
        line = writer.text(shown, align=_one(rng, ("left", style.align)))
        span = TextSpan(line, 0, len(shown))
    answers = [PrintedAnswer("date", day, [(TextSpan(span.line, span.start, span.start + len(day)),)])]
    if joined:
        answers.append(PrintedAnswer("time", clock, [(TextSpan(span.line, span.stop - len(clock), span.stop),)]))
    elif rng.random() < 0.5:
        span = writer.labelled(_one(rng, ("Time", "TIME")) + style.colon, clock, style.meta)
        answers.append(PrintedAnswer("time", clock, [(span,)]))
    return answers


def _items(writer: Writer, rng: np.random.Generator, style: _Style) -> tuple[list[PrintedAnswer], int]:
    """Item rows; returns their answers and the sum in cents."""
    form = int(rng.integers(4))
    heads = [
        (0.0, "left", _one(rng, ("Item", "Description", "ITEM", "Desc"))),
        (0.6, "right", _one(rng, ("Qty", "QTY"))),
        (1.0, "right", _one(rng, ("Amount", "RM", "Amt", "TOTAL", "Total"))),
    ]
    if rng.random() < 0.7:
        writer.cells(heads)
        writer.rule(style.rule if rng.random() < 0.6 else "none")
    answers, total, seen = [], 0, set()
    for _ in range(int(rng.integers(1, 9)) if rng.random() < 0.85 else int(rng.integers(9, 16))):
        name = texts.item_name(rng)
        if name in seen:
            continue
        seen.add(name)
        quantity = int(rng.integers(1, 4)) if rng.random() < 0.6 else 1
        price = max(5, round(float(np.exp(rng.uniform(0, 4.6))) * 20) * 5)
        cost = quantity * price
        total += cost
        shown = f"{cost / 100:.2f}"
        unit = f"{price / 100:.2f}"
        if form == 0:
            lines = writer.cells([(0.0, "left", name), (1.0, "right", shown)])
        elif form == 1:
            lines = writer.cells([(0.0, "left", name), (0.62, "right", str(quantity)), (1.0, "right", shown)])
        elif form == 2:
            writer.text(name)
            lines = writer.cells([(0.1, "left", f"{quantity} x {unit}"), (1.0, "right", shown)])
        else:
            writer.text(f"{rng.integers(10**8, 10**13)}" if rng.random() < 0.7 else f"{rng.integers(100, 9999)} {name}")
            lines = writer.cells(
                [(0.0, "left", name), (0.5, "right", str(quantity)), (0.72, "right", unit), (1.0, "right", shown)]
            )
        answers.append(PrintedAnswer("price", shown, [(TextSpan(lines[-1], 0, len(shown)),)], {"name": name}))
    return answers, total


def _totals(writer: Writer, rng: np.random.Generator, style: _Style, value: int) -> list[PrintedAnswer]:
    """Subtotal, tax, rounding, total, cash, change: some of them, total always and often more than once."""
    taxed = rng.random() < 0.5
    tax = round(value * 0.06) if taxed else 0
    total = round((value + tax) / 5) * 5
    cash = total if rng.random() < 0.3 else (total // 1000 + 1) * 1000
    answers: list[PrintedAnswer] = []

    def row(labels: tuple[str, ...], cents: int, field: str = "") -> None:
        shown = f"{cents / 100:.2f}"
        span = _amount_row(writer, rng, style, (_one(rng, labels), shown))
        if field:
            answers.append(PrintedAnswer(field, shown, [(span,)]))

    if rng.random() < 0.4:
        label = _one(rng, ("Total Qty", "Item(s)", "Total Items", "QTY"))
        _amount_row(writer, rng, style, (label, str(rng.integers(1, 20))), plain=True)
    if rng.random() < 0.6:
        row(_SUBTOTAL_LABELS, value, "subtotal")
    if taxed:
        row(_TAX_LABELS, tax, "tax")
    if rng.random() < 0.4:
        row(("Discount", "DISC", "Disc."), 0)
    if rng.random() < 0.4:
        row(("Rounding", "ROUNDING ADJ", "Rounding Adj"), total - value - tax)
    shown, labels = f"{total / 100:.2f}", list(_TOTAL_LABELS)
    spellings: list[tuple[TextSpan, ...]] = []
    for index in range(1 if rng.random() < 0.7 else 2):
        label = labels.pop(int(rng.integers(len(labels))))
        spellings.append((_amount_row(writer, rng, style, (label, shown), main=index == 0),))
    answers.append(PrintedAnswer("total", shown, spellings))
    if rng.random() < 0.75:
        row(_CASH_LABELS, cash, "cash")
        row(_CHANGE_LABELS, cash - total, "change")
    return answers


def _amount_row(
    writer: Writer,
    rng: np.random.Generator,
    style: _Style,
    row: tuple[str, str],
    *,
    main: bool = False,
    plain: bool = False,
) -> TextSpan:
    """A label and an amount in the totals' style; the main total is often larger or bold."""
    label, value = row
    size = int(writer.size * (rng.choice([1.0, 1.2, 1.5]) if main else 1.0))
    bold = bool(main and rng.random() < 0.5)
    label = (label.upper() if style.upper else label) + style.colon
    shown = style.currency + value if not plain and (main or rng.random() < 0.5) else value
    if style.totals == "mid":
        lines = writer.cells(
            [(0.62, "right", label), (1.0, "right", shown)],
            size=writer.fits(label + shown, size, 0.55 * writer.width),
            bold=bold,
        )
        return TextSpan(lines[1], len(shown) - len(value), len(shown))
    span = writer.labelled(label, shown, style.totals, size=size, bold=bold)
    return TextSpan(span.line, span.stop - len(value), span.stop)


def _tax_summary(writer: Writer, rng: np.random.Generator, value: int) -> None:
    writer.skip(0.5)
    writer.cells([(0.0, "left", "GST Summary"), (0.7, "right", "Amount(RM)"), (1.0, "right", "Tax(RM)")])
    rate = _one(rng, ("SR @ 6%", "ZRL (@ 0%)", "S = 6%", "SR 6%"))
    writer.cells(
        [(0.0, "left", rate), (0.7, "right", f"{value / 106:.2f}"), (1.0, "right", f"{value * 6 / 10600:.2f}")]
    )
