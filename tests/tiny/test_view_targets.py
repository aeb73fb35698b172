import numpy as np

from tiny.pack import PackedLine, PackedObject, PackedQuestion, Page
from tiny.render_views import View
from tiny.view_targets import build_example


def _shown(page, question, box=None):
    """Of the question of an example in one view: its characters that are shown, dots for the others, and the places of
    those (page pixels); and the places of the answer's characters."""
    width, height = (256, 128) if box is None else (box[2] - box[0], box[3] - box[1])
    view = View(page.pixels, box, (width // 32, height // 32))
    (query,) = build_example("t", [view], page, [question]).queries
    places = None if query.points is None else query.points[:, 0].tolist()
    if query.asked_points is None:
        return "", [], places
    seen = ~np.isnan(query.asked_points[:, 0, 0])
    text = "".join(char if known else "." for char, known in zip(query.question, seen, strict=True))
    return text, query.asked_points[seen, 0].tolist(), places


def test_the_words_of_a_question_are_found_beside_and_above_the_answer():
    def line(text, x, y):
        return PackedLine(text, (x, y, x + 10 * len(text), y + 16))

    texts = (("ITEM", 0, 10), ("PRICE", 200, 10), ("SOAP", 0, 40), ("9.50", 200, 41), ("TEA 1", 0, 70))
    lines = (*(line(*text) for text in texts), line("DATE 1/2/2018", 0, 100))
    page = Page(np.full((128, 256, 3), 255, np.uint8), "x", "p", lines, (), None)
    price = PackedQuestion("price", "What is the price of Soap?", "9.50", (), spans=((3, 0, 4),))
    text, places, answer = _shown(page, price)
    assert text == "............price....Soap."
    assert places[:2] == [[205, 18], [215, 18]]
    assert places[5] == [5, 48]
    assert answer == [[205, 49], [215, 49], [225, 49], [235, 49]]
    assert _shown(page, price, (0, 32, 256, 96))[0] == ".....................Soap."
    # without packed characters the answer is looked for at its places; its own letters are no words of the question
    date = PackedQuestion("date", "What is the date?", "1/2/2018", ((0, 100, 130, 116),))
    text, places, answer = _shown(page, date)
    assert (text, places[0], answer[0]) == ("............date.", [5, 108], [55, 108])
    assert _shown(page, PackedQuestion("date", "Which date?", "date", ((0, 100, 130, 116),)))[0] == ""
    assert _shown(page, PackedQuestion("kind", "What is the price?", "x", ())) == ("", [], None)


def test_the_words_of_a_question_name_the_object_of_the_answer():
    things = (PackedObject("red", "star", (120, 0, 184, 64)), PackedObject("red", "circle", (128, 64, 192, 128)))
    lines = (PackedLine("AB", (144, 90, 164, 106)),)
    page = Page(np.full((128, 256, 3), 255, np.uint8), "x", "p", lines, (), things)
    code = PackedQuestion("code", "What is on the red circle?", "AB", (lines[0].box,), spans=((0, 0, 2),))
    text, places, _ = _shown(page, code)
    assert text == "...............red.circle."
    assert places[0] == places[-1] == [160, 96]
    colour = PackedQuestion("colour_of", "Which colour is at AB?", "red", (things[1].box,))
    assert _shown(page, colour)[:2] == ("...................AB.", [[149, 98], [159, 98]])
