"""What the lines of a sheet say: the texts of tills and offices, from number columns to addresses and thanks."""

from __future__ import annotations

import numpy as np

from qzoom.data.synthetic import texts

_TAILS = ("GST", "SR", "ZRL", "RM", "QTY", "PCS", "KG", "EA", "S", "Z", "T", "X", "@", "-", ":", "*", "#")
_HEADS = (
    "TOTAL", "SUB TOTAL", "SUBTOTAL", "GRAND TOTAL", "CASH", "CHANGE", "ROUNDING", "TOTAL QTY", "ITEM(S)", "AMOUNT",
    "NETT TOTAL", "TOTAL SALES", "TOTAL (INCL. GST)", "TOTAL AMT PAYABLE", "GST 6%", "TAX", "DISCOUNT", "VISA CARD",
    "PAID AMOUNT", "BALANCE", "DATE", "TIME", "INVOICE NO", "INV NO.", "RECEIPT #", "BILL NO", "DOC NO.", "TRAN NO",
    "CASHIER", "COUNTER", "TABLE", "TERMINAL", "SALESPERSON", "MEMBER", "REF.", "APPROVAL CODE", "GST ID NO", "TEL",
    "FAX", "CO. REG NO", "OPERATOR", "SLIP NO.", "STORE", "POS", "SHIFT", "STAFF", "PAX", "UNIT PRICE", "U/P", "PRICE",
)  # fmt: skip
_SENTENCES = (
    "THANK YOU PLEASE COME AGAIN", "GOODS SOLD ARE NOT RETURNABLE", "NO REFUND NO EXCHANGE", "HAVE A NICE DAY",
    "PLEASE KEEP THIS RECEIPT", "EXCHANGE WITHIN 7 DAYS", "TERIMA KASIH SILA DATANG LAGI", "CUSTOMER COPY",
    "PRICES ARE INCLUSIVE OF GST", "THIS IS A COMPUTER GENERATED RECEIPT", "FOR ANY ENQUIRY PLEASE CALL",
    "OPENING HOURS 10AM TO 10PM", "SIMPLIFIED TAX INVOICE", "TAX INVOICE", "CASH RECEIPT", "GST SUMMARY",
    "DESCRIPTION", "AMOUNT(RM)", "TAX(RM)", "CODE", "ITEM", "QTY PRICE AMOUNT", "SIGNATURE", "DUPLICATE",
)  # fmt: skip
_UNITS = ("G", "ML", "KG", "L", "PCS", "S")
_NUMBERED = ("TEL", "FAX", "TEL NO.", "H/P", "GST ID", "GST NO", "CO NO")
_STREETS = ("JALAN", "JLN", "LORONG", "LEBUH", "PERSIARAN", "TAMAN", "BANDAR", "KAMPUNG", "ROAD", "STREET", "AVENUE")
_TOWNS = (
    "KUALA LUMPUR", "SELANGOR", "JOHOR BAHRU", "SHAH ALAM", "PETALING JAYA", "KLANG", "PENANG", "IPOH", "MELAKA",
    "SUBANG JAYA", "KAJANG", "CHERAS", "PUCHONG", "SEREMBAN", "AMPANG", "RAWANG", "CYBERJAYA", "BATU PAHAT", "MUAR",
)  # fmt: skip
_ANY = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:-/()#&%*'$@+=!"


def _one(rng: np.random.Generator, items: tuple[str, ...] | str) -> str:
    return items[int(rng.integers(len(items)))]


def sheet_line(rng: np.random.Generator) -> str:
    """A line, in capitals, title case or lower case."""
    text = " ".join(_plain(rng).split())[:44].strip() or "0"
    if rng.random() < 0.28:
        text = text.title() if rng.random() < 0.8 else text.lower()
    return text


def _plain(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.2:
        return _number(rng)
    if kind < 0.3:
        return _dated(rng)
    if kind < 0.42:
        colon = _one(rng, ("", ":", " :", ": "))
        return f"{_one(rng, _HEADS)}{colon} {_number(rng) if rng.random() < 0.5 else ''}"
    if kind < 0.5:
        return texts.code(rng, 1, 14)
    if kind < 0.58:
        return texts.company(rng)
    if kind < 0.66:
        name, size = texts.item_name(rng), f" {rng.integers(1, 999)}{_one(rng, _UNITS)}"
        return name + size if rng.random() < 0.4 else name
    if kind < 0.75:
        return _address(rng)
    if kind < 0.8:
        return f"{_one(rng, _NUMBERED)}{_one(rng, (': ', ' : ', ':', ' '))}{_digits(rng)}"
    if kind < 0.86:
        return _one(rng, _SENTENCES)
    if kind < 0.9:
        return texts.random_text(rng)
    return "".join(_one(rng, _ANY) for _ in range(int(rng.integers(1, 12))))


def _number(rng: np.random.Generator) -> str:
    """An amount, a count or a sum, with what tills print around it."""
    kind = rng.random()
    if kind < 0.55:
        amount = texts.amount(rng)
        amount = amount if rng.random() < 0.93 else "-" + amount
        currency = _one(rng, ("", "", "", "RM", "RM ", "$", "MYR "))
        return currency + amount + _one(rng, ("", "", "", " " + _one(rng, _TAILS)))
    if kind < 0.7:
        return f"{rng.integers(0, 30)}"
    if kind < 0.85:
        return f"{rng.integers(1, 20)} {_one(rng, ('X', 'x', '@', '*', 'PCS X'))} {texts.amount(rng)}"
    return f"{_one(rng, _TAILS)} {texts.amount(rng)} {texts.amount(rng)}"


def _dated(rng: np.random.Generator) -> str:
    day, clock = texts.date(rng), texts.time(rng)
    kind = rng.random()
    if kind < 0.4:
        return day
    if kind < 0.55:
        return clock
    lead = _one(rng, ("", "", "DATE: ", "DATE : ", "DATE ", "INVOICE DATE: "))
    return lead + day + (f" {clock}" if rng.random() < 0.6 else "")


def _digits(rng: np.random.Generator) -> str:
    if rng.random() < 0.6:
        return texts.phone(rng)
    return f"{int(rng.integers(10**5, 10**12))}" + _one(rng, ("", "", "-X", "-W", "-T", "-K"))


def _address(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.4:
        number = f"NO.{rng.integers(1, 400)}{_one(rng, ('', '-G', 'A', '-1', ' & 5'))}, "
        return f"{number}{_one(rng, _STREETS)} {texts.person(rng)} {rng.integers(1, 40)}/{rng.integers(1, 30)}"
    if kind < 0.7:
        return f"{rng.integers(10000, 99999)} {_one(rng, _TOWNS)}{_one(rng, ('', ',', '.'))}"
    return f"{_one(rng, _STREETS)} {texts.company(rng).split(' ')[0]}, {_one(rng, _TOWNS)}"
