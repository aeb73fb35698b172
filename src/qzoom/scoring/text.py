"""How benchmarks read an answer before they compare it. No model is asked: what rules do not decide is wrong.

`plain_answer` is the VQA challenge's form, with the slips of the harnesses behind a flag, since published figures
contain them. `same_answer` compares ZoomBench's short answers, and the functions named `release` do what the authors'
release of ZoomBench does.
"""

from __future__ import annotations

import math
import re

_FINAL = ".!,\u3002\uff0e\uff01\uff0c"
_QUOTES = {
    '"': '"',
    "'": "'",
    "\u201d": "\u201c\u201e\u201d",
    "\u2019": "\u2018\u201a\u2019",
    "\u201c": "\u201e",
    "\u2018": "\u201a",
    "\xbb": "\xab",
    "\xab": "\xbb",
    "\u300d": "\u300c",
    "\u300f": "\u300e",
}
_ALSO_OPEN = "\u201c\u2018\xab"


def without_final_marks(text: str) -> str:
    """The text without the full stops, exclamation marks, commas and closing quotes at its end.

    The opening quote goes with its closing one. A straight quote after a digit that nothing opens is a unit (feet,
    inches) and stays. A text of such marks alone stays as it is, so that it equals only itself.
    """
    bare = text.strip()
    while bare:
        last, rest = bare[-1], bare[:-1].rstrip()
        opened = len(rest) > 0 and rest[0] in _QUOTES.get(last, "")
        unit = last in "\"'" and bare[-2:-1].isdigit()
        if last not in _FINAL and not opened and (last not in _QUOTES or last in _ALSO_OPEN or unit):
            break
        bare = rest[1:].lstrip() if opened else rest
    return bare or text.strip()


def plain(text: str) -> str:
    """The text without case and final marks, runs of white space as one space."""
    return " ".join(without_final_marks(text).casefold().split())


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_WRITTEN_NUMBER = re.compile(rf"([-+]?(?:{_DIGITS}(?:\.\d+)?|\.\d+))(\s?%)?")


def read_number(text: str) -> float | None:
    """The value of a text that is one number; None for any other text.

    A number is an optional sign, digits with or without commas between thousands, optional decimals after a full stop,
    and at most one per cent sign, which divides by 100. Exponents, underscores, nan and inf are no numbers.
    """
    number = _WRITTEN_NUMBER.fullmatch(text.strip())
    if number is None:
        return None
    value = float(number[1].replace(",", ""))
    value = value / 100 if number[2] else value
    return value if math.isfinite(value) else None


NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
"""The numbers from 0 to 20."""
_NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS[:11])} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = re.findall(
    r"\S+",
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll "
    "how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't "
    "should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll "
    "that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's "
    "won't would've wouldn't y'all you'd you'll you're you've couldn't've hadn't've he'd've it'd've "
    "mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've "
    "who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at",
)
_DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_HARNESS_STOPS = 32  # the harnesses pass a regex flag where a count is expected


_MENDED = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}
_HARNESS_MENDED = _MENDED | {"somebody'd": "somebodyd"}


def plain_answer(text: str, *, harness: bool = False) -> str:
    """The answer as it is compared. `harness`: with the harnesses' slips: only 32 full stops go, "somebody'd" loses its
    apostrophe, and an answer that consists of articles and punctuation becomes empty, where else it stays as it is."""
    given = text = text if harness else without_final_marks(text)
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = _unmarked(text.strip().replace("\n", " ").replace("\t", " ").strip())
    text = _FULL_STOP.sub("", text, count=_HARNESS_STOPS if harness else 0)
    mended = _HARNESS_MENDED if harness else _MENDED
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    kept = " ".join(mended.get(word, word) for word in words if word not in _ARTICLES)
    return kept if kept or harness else " ".join(given.lower().split())


def _unmarked(text: str) -> str:
    """Punctuation at a word's end goes, inside a word it becomes a space."""
    joined = bool(_DIGIT_COMMA.search(text))
    out = text
    for mark in _MARKS:
        at_edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_edge or joined else " ")
    return out


_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(rf"(?<![\w.,])[-+]?{_DIGITS}(?:\.\d+)?(?![\w]|[.,]\d)")
_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
_LETTERS = (re.compile(r"\(([A-Z])\)"), re.compile(r"([A-Z])[.)\s]"), re.compile(r"([A-Z])"))


def release_part(reply: str) -> str:
    """The part of a reply that the release looks at: the first answer tag, else from "Answer:" on, that word included,
    else the last three lines."""
    if "<answer>" in reply:
        opened = reply.index("<answer>") + len("<answer>")
        closed = reply.find("</answer>", opened)
        return reply[opened : closed if closed >= 0 else None]
    if "Answer:" in reply:
        return reply[reply.index("Answer:") :]
    return "\n".join(reply.split("\n")[-3:])


def release_letter(reply: str) -> str | None:
    """The option that the release's letter rule reads: a capital in round brackets, else one before a full stop, a
    bracket or a space, else the first capital. So "A red bus" is A and "Option C" is O."""
    part = release_part(reply)
    for pattern in _LETTERS:
        found = pattern.search(part)
        if found:
            return found[1]
    return None


def number_in(text: str) -> float | None:
    """The one number that a text names, in digits or as a word up to twenty; None for none or for different ones."""
    found = {float(number.replace(",", "")) for number in _NUMBER.findall(text)}
    found |= {float(NUMBER_WORDS.index(word.lower())) for word in _WORD.findall(text)}
    return found.pop() if len(found) == 1 else None


def final_part(reply: str) -> str:
    """What stands in the last answer tag; the whole reply without one."""
    tags = _TAG.findall(reply)
    return tags[-1] if tags else reply


def same_answer(reply: str, answer: str) -> bool:
    """Whether a reply gives a short answer: the same text up to case and spaces, or, where the answer is a number, a
    reply that names that number and no other.

    Args:
        reply: what was answered; of several answer tags the last one counts.
    """
    said = final_part(reply)
    if plain(said) == plain(answer):
        return True
    wanted = number_in(answer) if _is_number(answer) else None
    return wanted is not None and number_in(said) == wanted


def same_answer_release(reply: str, answer: str) -> bool:
    """The same by the release's part of the reply and equality of texts or numbers, where it would go on to a model."""
    said = release_part(reply)
    if said.strip().lower() == answer.strip().lower():
        return True
    return _is_number(said) and _is_number(answer) and number_in(said) == number_in(answer)


def _is_number(text: str) -> bool:
    bare = text.strip().rstrip(".")
    return bool(_NUMBER.fullmatch(bare) or _WORD.fullmatch(bare))
