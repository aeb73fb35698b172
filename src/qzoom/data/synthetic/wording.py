"""How the synthetic questions are worded: several phrasings for every field.

The tokenizer of the embedded model learns its merges from these sentences only, so this list also decides which
words are short in tokens. The first phrasing of a field is its standard one, used for held-out pictures.
"""

from __future__ import annotations

import numpy as np

__all__ = ["COLOURS", "FIELD_WORDINGS", "SHAPES", "ask", "vocabulary_sentences"]

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

_EXTRA_SENTENCES = (
    "what is the name of the item in the first row second third last bottom top of the page yes no left right middle",
    "receipt invoice form table order member account bill document reference number amount quantity address city phone",
    "grand rounding cash change paid payment due service charge discount balance price unit cost item code description",
    "where is it who when which how many much does do are was were has have printed shown given written on in at for",
)


def ask(field: str, rng: np.random.Generator | None = None, **names: str) -> str:
    """A question on a field, its blanks filled from `names`; without a generator the standard wording."""
    choices = FIELD_WORDINGS[field]
    wording = choices[0] if rng is None else choices[int(rng.integers(len(choices)))]
    return wording.format(**names)


def vocabulary_sentences() -> list[str]:
    """The lower-case sentences from which tokenizer merges are learned; always the same list in the same order."""
    blank = dict.fromkeys(("n", "name", "column", "code", "colour", "shape", "colour2", "shape2"), "")
    sentences = [wording.format(**blank).lower() for wordings in FIELD_WORDINGS.values() for wording in wordings]
    words = " ".join((*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)))
    return [*sentences, words, *_EXTRA_SENTENCES]
