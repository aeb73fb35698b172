import numpy as np
import pytest

from tiny.curriculum import Context, examples_of
from tiny.pack import PackedLine, PackedQuestion, Page
from tiny.respell import respell, respell_company

PAPER = 220
WIDTHS = {"A": 4, "B": 5, "C": 6, "D": 7, "1": 4, "2": 5, "3": 6, "-": 3}
GREYS = {"A": 10, "B": 20, "C": 30, "D": 40, "1": 50, "2": 60, "3": 70, "-": 80}


def printed(pixels, text, x, y, gap=2):
    """Print every character as a block of its own grey and width; returns the line."""
    start = x
    for character in text:
        if character == " ":
            x += 6
            continue
        pixels[y : y + 10, x : x + WIDTHS[character]] = GREYS[character]
        x += WIDTHS[character] + gap
    return PackedLine(text, (start, y, x, y + 10))


def page(*texts, gap=2, questions=()):
    pixels = np.full((20 * len(texts) + 10, 120), PAPER, dtype=np.uint8)
    lines = tuple(printed(pixels, text, 5, 5 + 20 * row, gap) for row, text in enumerate(texts))
    asked = tuple(
        PackedQuestion(field, f"What is the {field}?", lines[n].text, (lines[n].box,)) for field, n in questions
    )
    return Page(pixels, "receipt", "p", lines, asked, capitals=True)


def read(page, line):
    """What a row of blocks says, by their greys."""
    x0, y0, x1, _ = page.lines[line].box
    row = page.pixels[y0 + 5, x0:x1].tolist()
    shown = {grey: character for character, grey in GREYS.items()}
    return "".join(
        shown[grey] for place, grey in enumerate(row) if grey != PAPER and (not place or row[place - 1] != grey)
    )


def test_letters_and_digits_change_places_in_text_and_print():
    before = page("AB CD-123", "DCBA")
    seen = set()
    for seed in range(20):
        after = respell(before, np.random.default_rng(seed))
        first, second = (line.text for line in after.lines)
        assert [read(after, n) for n in (0, 1)] == [first.replace(" ", ""), second]
        assert (first[2], first[5], sorted(first[:5]), sorted(first[6:])) == (" ", "-", list(" ABCD"), list("123"))
        assert [line.box for line in after.lines] == [line.box for line in before.lines]
        seen.add(first)
    assert len(seen) > 10
    assert read(before, 1) == "DCBA", "the packed page stays as it is"


@pytest.mark.parametrize(
    ("text", "said", "gap"), [("ABCD", "ABC", 2), ("ABC", "ABCD", 2), ("ABCD", "ABCD", 0), ("AB CD", "ABC D", 2)]
)
def test_lines_whose_characters_cannot_be_told_apart_stay(text, said, gap):
    shown = page(text, gap=gap)
    wrong = Page(shown.pixels, "receipt", "p", (PackedLine(said, shown.lines[0].box),), (), capitals=True)
    after = respell(wrong, np.random.default_rng(0))
    assert after.lines[0].text == said
    assert (after.pixels == shown.pixels).all()


def test_two_characters_that_touch_beside_one_that_is_broken_are_not_mistaken_for_three():
    pixels = np.full((20, 60), PAPER, dtype=np.uint8)
    for start, stop in ((5, 9), (11, 23), (25, 27), (29, 31)):
        pixels[5:15, start:stop] = 30
    line = PackedLine("ABCD", (5, 5, 31, 15))
    after = respell(Page(pixels, "receipt", "p", (line,), (), capitals=True), np.random.default_rng(0))
    assert after.lines[0].text == "ABCD"


def test_the_company_changes_with_its_answer_and_nothing_else_does():
    before = page("ABCD", "123", "DCA", questions=(("company", 0), ("total", 1)))
    after = next(
        changed
        for changed in (respell_company(before, np.random.default_rng(seed)) for seed in range(9))
        if changed.lines[0].text != "ABCD"
    )
    assert read(after, 0) == after.lines[0].text == after.questions[0].answer
    assert sorted(after.questions[0].answer) == list("ABCD")
    assert [line.text for line in after.lines[1:]] == ["123", "DCA"]
    assert after.questions[1].answer == "123"
    twice = page("ABCD", "ABCD", questions=(("company", 0),))
    assert respell_company(twice, np.random.default_rng(1)) is twice


@pytest.mark.parametrize(
    ("held_out", "share", "changes"), [(False, 1.0, True), (False, 0.0, False), (True, 1.0, False)]
)
def test_training_lines_are_respelled_and_held_out_ones_never(held_out, share, changes):
    packs = {name: [page("ABCDABCD")] for name in ("receipts_train", "receipts_held_out")}

    def answers(seed):
        context = Context(packs, np.random.default_rng(seed), held_out=held_out, respelled=share)
        return {query.answer.upper() for example in examples_of("real_line", context) for query in example.queries}

    found = set().union(*(answers(seed) for seed in range(4)))
    assert (found != {"ABCDABCD"}) == changes
    assert {"".join(sorted(text)) for text in found} == {"AABBCCDD"}
