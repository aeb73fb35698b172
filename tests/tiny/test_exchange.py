import numpy as np
import pytest

from tiny.curriculum import Context
from tiny.exchange import exchange_values
from tiny.pack import PackedLine, PackedQuestion, Page

GREYS = {"12.30": 10, "RM 4.50": 20, "99.00 SR": 30, "01/02/2018": 40, "17-05-19": 50}


def page(lines, questions, size_px=(200, 200), paper=220):
    pixels = np.full((size_px[1], size_px[0]), paper, dtype=np.uint8)
    for line in lines:
        x0, y0, x1, y1 = line.box
        pixels[(y0 + y1) // 2, x0:x1] = GREYS.get(line.text, 60)
    return Page(pixels, "receipt", "p", tuple(lines), tuple(questions), capitals=True)


def question(field, answer, *boxes):
    return PackedQuestion(field, f"What is the {field}?", answer, boxes)


def receipt(**changes):
    lines = [
        PackedLine("TOTAL", (5, 20, 45, 30)),
        PackedLine("12.30", (140, 20, 180, 30)),
        PackedLine("CASH", (5, 40, 45, 50)),
        PackedLine("12.30", (140, 40, 180, 50)),
        PackedLine("TEA", (5, 60, 45, 70)),
        PackedLine("RM 4.50", (130, 60, 180, 70)),
        PackedLine("01/02/2018", (5, 80, 75, 90)),
    ]
    asked = [
        question("total", "12.30", lines[1].box, lines[3].box),
        question("date", "01/02/2018", lines[6].box),
        question("value", "12.30", lines[3].box),
    ]
    return page(changes.get("lines", lines), asked)


def other():
    line = PackedLine("17-05-19", (10, 100, 90, 120))
    return page([line], [question("date", "17-05-19", line.box)], paper=200)


def test_amounts_change_places_everywhere_and_the_date_comes_from_the_other_receipt():
    before = receipt()
    swapped = next(
        after
        for after in (exchange_values(before, other(), np.random.default_rng(seed)) for seed in range(9))
        if after.questions[0].answer == "4.50"
    )
    texts = [line.text for line in swapped.lines]
    assert texts == ["TOTAL", "RM 4.50", "CASH", "RM 4.50", "TEA", "12.30", "17-05-19"]
    total, date, *values = swapped.questions
    assert total.boxes == ((130, 20, 180, 30), (130, 40, 180, 50)), "as high as before, the right edge kept"
    assert (date.answer, date.boxes) == ("17-05-19", ((5, 80, 45, 90),))
    assert {q.question: q.answer for q in values} == {"What is the cash?": "4.50", "What is the tea?": "12.30"}
    row = swapped.pixels[25]
    assert row[155] == GREYS["RM 4.50"], "the print of the other amount"
    assert swapped.pixels[65, 155] == GREYS["12.30"]
    assert swapped.pixels[84:86, 20].min() < 180, "print"
    assert (swapped.pixels[80:82, 10:40] == 220).all(), "on paper of this receipt's grey"
    assert swapped.pixels[85, 60] == 220, "the end of the longer date is covered"
    assert before.pixels[25, 155] == GREYS["12.30"], "the packed page itself stays"


def test_a_value_that_is_printed_inside_a_longer_line_stays():
    lines = [*receipt().lines, PackedLine("THANK YOU FOR 12.30", (5, 120, 160, 130))]
    for seed in range(4):
        swapped = exchange_values(receipt(lines=lines), other(), np.random.default_rng(seed))
        assert swapped.questions[0].answer == "12.30"
        assert [line.text for line in swapped.lines[:6]] == [line.text for line in lines[:6]]


@pytest.mark.parametrize("right_px", [129, 60])
def test_what_does_not_fit_beside_its_neighbour_stays(right_px):
    lines = list(receipt().lines)
    lines[0] = PackedLine("TOTAL", (5, 20, right_px, 30))
    lines[1] = PackedLine("12.30", (150, 20, 180, 30))
    lines[5] = PackedLine("RM 4.50", (80, 60, 180, 70))
    texts = {
        exchange_values(receipt(lines=lines), other(), np.random.default_rng(seed)).lines[1].text for seed in range(9)
    }
    assert texts == ({"12.30"} if right_px == 129 else {"12.30", "RM 4.50"})


@pytest.mark.parametrize(("held_out", "exchanged", "texts"), [
    (False, 1.0, {"12.30", "RM 4.50"}), (False, 0.0, {"12.30"}), (True, 1.0, {"12.30"}),
])  # fmt: skip
def test_training_pages_are_exchanged_and_held_out_ones_never(held_out, exchanged, texts):
    packs = {name: [receipt()] for name in ("receipts_train", "receipts_held_out")}

    def shown(seed):
        context = Context(packs, np.random.default_rng(seed), held_out=held_out, exchanged=exchanged)
        return context.page("real", to_spell=seed % 2 == 1).lines[1].text

    assert {shown(seed) for seed in range(12)} == texts
