"""The printed texts (amounts, dates, codes, names, items, drawn at random) and the wording of questions.

Every field has several phrasings; held-out images use the first. The tokenizer of the embedded model learns its merges
from these sentences only, so the list also decides which words take few tokens.
"""

from __future__ import annotations

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """What stands between the bars of a text; "a|b c" has two phrases."""
    return tuple(text.split("|"))


_SYLLABLES = _words(
    "SA MA TA RI NG KO LIM TAN CHE ONG WA HI SE TU BAN KUA LA LUM PUR JA YA GE RAN SU PER MAR KET TEH BA "
    "LU DE VI AR EN NOR ZA MI PA RA SHI HO YU CHI FU KE GO LO MO NI O PE QU SI TE U VE XI ZO AN IN ON ER "
    "AL US IS AM EL"
)
_TRADES = _words(
    "ENTERPRISE TRADING HARDWARE RESTAURANT SUPPLIES MOTOR STATIONERY BAKERY CAFE MART PHARMACY BOOKS "
    "ELECTRICAL FOOD RESTORAN KEDAI PERNIAGAAN SUPERMARKET MACHINERY SERVICES PRINT CATERING HOLDINGS "
    "STORE SHOP FASHION GIFT DECO INDUSTRIES MARKETING BOUTIQUE STATION SEAFOOD CONFECTIONERY RETAIL "
    "HOUSE VIDEO OPTICAL FLORIST CORNER"
)
_LEADS = _words("SYARIKAT RESTORAN KEDAI PASAR RAYA PERNIAGAAN AEON MR. THE GUARDIAN UNI LIAN HING ECO BIG")
_ENDS = phrases("SDN BHD|SDN. BHD.|(M) SDN BHD|S/B|ENTERPRISE|TRADING|SDN BHD|(KL) SDN BHD|||SDN BHD")
_FIRST = _words("ALI SITI TAN LIM WONG AHMAD NUR LEE CHONG MEI RAJ KUMAR ANNA PETER MARY JOHN SARA OMAR IDA WEI NICOLE")
_ITEMS = _words(
    "TEA COFFEE BREAD MILK RICE SUGAR FLOUR EGG CHICKEN FISH BEEF NOODLE SOUP CAKE BUN PEN BOOK PAPER "
    "GLUE TAPE BRUSH PAINT NAIL SCREW BOLT PIPE CABLE BULB LAMP FAN SOAP TOWEL CUP PLATE SPOON BOWL KNIFE "
    "BAG BOX HAT SHIRT SOCK SHOE WATER JUICE COLA BEER OIL SALT SAUCE CHILI ONION TOMATO APPLE MANGO "
    "BANANA LEMON ORANGE GRAPE DONUT PIZZA BURGER FRIES SALAD TOFU"
)
_ITEM_WORDS = _words(
    "BIG SMALL HOT ICED FRESH SWEET WHITE BLACK RED GREEN BLUE SET EXTRA MINI SUPER DELUXE CLASSIC SPICY"
)
_MONTHS = _words("JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC")
LABELS = phrases(
    "Total|Date|Time|Invoice No|Bill No|Receipt No|Cash|Change|Tax|Subtotal|Discount|Rounding|Qty|Amount|"
    "Order No|Member ID|Cashier|Table|Phone|Fax|Ref|Account|Price|Balance|Terminal|Counter|Customer|Net|Paid|"
    "Code|Deposit|Weight"
)
_CHARS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LOWER = "abcdefghijklmnopqrstuvwxyz"
_PUNCTUATION = ".,:-/()#&%*'"


def _pick(rng: np.random.Generator, items: tuple[str, ...] | str) -> str:
    return str(items[int(rng.integers(len(items)))])


def amount(rng: np.random.Generator) -> str:
    """A price with two decimals, small ones more often: "7.50", "1,204.00" (comma rarely)."""
    value = float(np.exp(rng.uniform(np.log(0.3), np.log(900.0)))) if rng.random() < 0.95 else rng.uniform(900, 99999)
    cents = round(value * 20) * 5 if rng.random() < 0.7 else round(value * 100)
    text = f"{cents / 100:,.2f}"
    return text if rng.random() < 0.3 else text.replace(",", "")


_DATES = (
    *["{day:02d}/{month:02d}/{year}"] * 9,
    *["{day:02d}-{month:02d}-{year}"] * 3,
    *("{day:02d}/{month:02d}/{short:02d}", "{day:02d}-{month:02d}-{short:02d}", "{day:02d}.{month:02d}.{year}"),
    *("{day} {name} {year}", "{day:02d}-{name}-{year}", "{day} {title} {year}"),
    *("{year}-{month:02d}-{day:02d}", "{day}/{month}/{year}"),
)


def date(rng: np.random.Generator) -> str:
    """A date in one of many formats."""
    day, month, year = int(rng.integers(1, 32)), int(rng.integers(1, 13)), int(rng.integers(2010, 2026))
    name = _MONTHS[month - 1]
    form = _DATES[int(rng.integers(len(_DATES)))]
    return form.format(day=day, month=month, year=year, short=year % 100, name=name, title=name.title())


def time(rng: np.random.Generator) -> str:
    """A time of day."""
    hour, minute, second = int(rng.integers(24)), int(rng.integers(60)), int(rng.integers(60))
    if rng.random() < 0.4:
        return f"{hour:02d}:{minute:02d}"
    if rng.random() < 0.5:
        return f"{hour % 12 or 12}:{minute:02d} {'PM' if hour > 11 else 'AM'}"
    return f"{hour:02d}:{minute:02d}:{second:02d}"


def code(rng: np.random.Generator, low: int = 2, high: int = 10) -> str:
    """A reference code of digits, sometimes with capitals in front or inside."""
    size = int(rng.integers(low, high + 1))
    kind = rng.random()
    if kind < 0.5:
        return "".join(_pick(rng, "0123456789") for _ in range(size))
    if kind < 0.8:
        lead = "".join(_pick(rng, _CHARS[10:]) for _ in range(int(rng.integers(1, 4))))
        return lead + "".join(_pick(rng, "0123456789") for _ in range(size))
    return "".join(_pick(rng, _CHARS) for _ in range(size))


def phone(rng: np.random.Generator) -> str:
    """A phone number."""
    return f"0{rng.integers(1, 10)}-{rng.integers(10**6, 10**8)}"


def _word(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, _SYLLABLES) for _ in range(int(rng.integers(1, 4))))


def company(rng: np.random.Generator) -> str:
    """A shop or company name in capitals."""
    words = [_word(rng) for _ in range(int(rng.integers(1, 3)))]
    if rng.random() < 0.25:
        words.insert(0, _pick(rng, _LEADS))
    if rng.random() < 0.7:
        words.append(_pick(rng, _TRADES))
    if rng.random() < 0.08:
        words.insert(1, "&")
    end = _pick(rng, _ENDS)
    return " ".join([*words, end]).strip()


def person(rng: np.random.Generator) -> str:
    """A person's name in capitals."""
    return f"{_pick(rng, _FIRST)} {_word(rng) if rng.random() < 0.7 else _pick(rng, _FIRST)}"


def item_name(rng: np.random.Generator) -> str:
    """The name of something sold, capitals, one to three words."""
    words = [_pick(rng, _ITEMS)]
    if rng.random() < 0.5:
        words.insert(0, _pick(rng, _ITEM_WORDS))
    if rng.random() < 0.25:
        words.append(_pick(rng, _ITEMS))
    return " ".join(words)


def label(rng: np.random.Generator) -> str:
    """A field label as receipts print it."""
    return _pick(rng, LABELS)


def random_text(rng: np.random.Generator) -> str:
    """Any short text: words, codes, amounts, mixed characters, in capitals or lower case."""
    kind = rng.random()
    if kind < 0.15:
        return amount(rng)
    if kind < 0.3:
        return date(rng)
    if kind < 0.45:
        return code(rng, 1, 8)
    if kind < 0.6:
        return company(rng)[:18].strip()
    if kind < 0.7:
        return item_name(rng)
    if kind < 0.8:
        return label(rng) + _pick(rng, (":", "", " :", "."))
    if kind < 0.85:
        return phone(rng)
    if kind < 0.9:
        return "".join(_pick(rng, _LOWER) for _ in range(int(rng.integers(2, 9)))).capitalize()
    pool = _CHARS + _CHARS + _LOWER + _PUNCTUATION
    return "".join(_pick(rng, pool) for _ in range(int(rng.integers(1, 9))))


def field_value(rng: np.random.Generator, name: str) -> str:
    """A value that fits a label of `LABELS` or a table's column."""
    if name == "Date":
        return date(rng)
    if name == "Time":
        return time(rng)
    if name in ("Phone", "Fax"):
        return phone(rng)
    if name in ("Cashier", "Customer"):
        return person(rng)
    if name in ("Qty", "Table", "Counter", "Terminal", "Stock", "Score"):
        return str(int(rng.integers(1, 100)))
    if name in ("Invoice No", "Bill No", "Receipt No", "Order No", "Member ID", "Ref", "Account", "Code"):
        return code(rng, 3, 9)
    prefix = str(rng.choice(["", "", "", "RM ", "RM", "$"]))
    return prefix + amount(rng)


def bare_amount(value: str) -> str:
    """The value without a currency sign in front ("RM 12.50" -> "12.50"); other values unchanged."""
    for sign in ("RM ", "RM", "$"):
        if value.startswith(sign) and value[len(sign) :][:1].isdigit() and "." in value:
            return value[len(sign) :]
    return value


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 32, 41),
    "blue": (36, 84, 196),
    "green": (30, 140, 60),
    "yellow": (240, 205, 30),
    "orange": (240, 130, 25),
    "purple": (130, 50, 160),
    "black": (35, 35, 35),
    "pink": (240, 140, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")

FIELD_WORDINGS: dict[str, tuple[str, ...]] = {
    "text": ("What does it say?", "What is written here?", "Read the text."),
    "line": ("What does line {n} say?", "Read line {n}."),
    "value": ("What is the {name}?", "What does it say for {name}?", "Read the {name}."),
    "total": (
        "What is the total amount?",
        "What is the total?",
        "How much is the total?",
        "How much was paid in total?",
    ),
    "date": ("What is the date?", "What date is printed?", "When was it issued?", "What is the date of the document?"),
    "company": ("What is the company name?", "Which company issued this?", "What is the name of the shop?"),
    "number": ("What is the {name} number?", "Read the {name} number.", "Which {name} number is printed?"),
    "customer": ("What is the customer name?", "Who is the customer?", "What is the name of the customer?"),
    "price": ("What is the price of {name}?", "How much is {name}?", "What does {name} cost?"),
    "cash": ("How much cash was given?", "What is the cash amount?"),
    "change": ("How much is the change?", "What is the change?"),
    "subtotal": ("What is the subtotal?", "How much is the subtotal?"),
    "tax": ("How much is the tax?", "What is the tax amount?"),
    "time": ("What is the time?", "What time is printed?"),
    "phone": ("What is the phone number?", "Which phone number is printed?"),
    "cell": ("What is the {column} of {name}?", "What is in column {column} for {name}?"),
    "heading": ("What is the heading?", "What is the title of the document?"),
    "kind": ("What kind of document is this?", "Is this a receipt, an invoice, a form or a table?"),
    "stamp": ("Is there a stamp?", "Does the document have a stamp?"),
    "stamp_colour": ("What colour is the stamp?",),
    "code": (
        "What is the code on the {colour} {shape}?",
        "Which code is on the {colour} {shape}?",
        "What is the code of the {colour} {shape}?",
        "Read the tag of the {colour} {shape}.",
    ),
    "colour_of": ("What colour is the {shape} with code {code}?", "What is the colour of the object with code {code}?"),
    "count": ("How many {shape}s are there?", "Count the {shape}s.", "How many objects are {colour}?"),
    "exists": ("Is there a {colour} {shape}?", "Does the picture have a {colour} {shape}?"),
    "side": (
        "Is the {colour} {shape} left or right of the {colour2} {shape2}?",
        "Is the {colour} {shape} to the left or to the right of the {colour2} {shape2}?",
    ),
    "neighbour": ("What is the code left of the {colour} {shape}?", "What is the code right of the {colour} {shape}?"),
    "background": ("What colour is the background?",),
    "sign": ("What does the large sign say?", "What is written on the big sign?"),
}


def ask(field: str, rng: np.random.Generator | None = None, **names: str) -> str:
    """A question on a field, its blanks filled from `names`; without a generator the standard wording."""
    choices = FIELD_WORDINGS[field]
    wording = choices[0] if rng is None else choices[int(rng.integers(len(choices)))]
    return wording.format(**names)
