import base64
import dataclasses
import io
import re

from PIL import Image

from qzoom.plots.answer import answer_html
from qzoom.types import Region

from .conftest import MAGENTA, count_colour, make_answer


def embedded(page):
    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page).group(1)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_figure_is_embedded_and_texts_escaped(answer):
    page = answer_html(answer)
    assert embedded(page).size == answer.plot().size
    assert page.startswith("<div")
    assert page.endswith("</div>")
    assert answer._repr_html_() == page
    bad = '<script>alert("x")</script>'
    page = answer_html(make_answer(text=bad, question=bad + "'&", notes=(bad,)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count('"') % 2 == 0
    page = answer_html(answer)
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    page = answer_html(answer)
    assert "gate 0.800, zooms from 0.1" in page
    assert "region [300, 800, 500, 860] of picture 1" in page
    assert "72 coarse + 30 region tokens" in page
    assert "no zoom" in answer_html(make_answer(zoomed=False))


def test_the_picture_with_the_region_or_texts_without_one(answer):
    plain = Image.new("RGB", (600, 1200), (0, 0, 250))
    second = dataclasses.replace(
        answer, images=(plain, answer.images[0]), regions=(Region((300, 800, 500, 860), 0.9, 1, (320, 96), 30),)
    )
    assert count_colour(embedded(answer_html(second)), MAGENTA, 30) > 10_000
    page = answer_html(dataclasses.replace(answer, images=()))
    assert "<img" not in page
    assert "33.90" in page
    assert "What is the total?" in page
