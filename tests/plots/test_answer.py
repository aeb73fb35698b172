import dataclasses
import threading

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import DataError
from qzoom.plots.answer import plot_answer, save_plot
from qzoom.plots.text import ACCENTS, FIGURE_WIDTH_PX
from qzoom.types import GateDecision, HeatMap, Region

from .conftest import GREEN, MAGENTA, count_colour, make_answer


def test_page_region_and_coarse_text_are_drawn(answer):
    figure = plot_answer(answer)
    assert figure.mode == "RGB"
    assert figure.width == FIGURE_WIDTH_PX
    page_share = count_colour(figure, GREEN) / (620 * 1240)
    assert 0.75 < page_share < 1
    box_on_page = 200 * 60 * (1240 / 1200) ** 2
    assert count_colour(figure, MAGENTA) > 10 * box_on_page
    assert count_colour(figure, ACCENTS[0]) > 1000
    figure = plot_answer(make_answer(zoomed=False))
    assert count_colour(figure, ACCENTS[0], 0) == 0
    assert count_colour(figure, MAGENTA) < 2 * 200 * 60
    plain = dataclasses.replace(answer, heat_maps=())
    flat = dataclasses.replace(answer, heat_maps=(HeatMap(np.ones((12, 6), np.float32)),))
    assert count_colour(plot_answer(flat), GREEN) < 0.1 * count_colour(plot_answer(plain), GREEN)
    assert plot_answer(answer, coarse_text="83.90").tobytes() != plot_answer(answer).tobytes()
    assert plot_answer(answer, coarse_text="83.90").size == plot_answer(answer).size


@pytest.mark.parametrize("size", [(600, 1200), (2000, 900), (1024, 1024), (2, 2), (2000, 12), (12, 2000)])
@pytest.mark.parametrize("zoomed", [True, False])
def test_every_shape(size, zoomed):
    box = (size[0] // 2, size[1] // 2, size[0], size[1])
    figure = plot_answer(make_answer(size=size, box=box, zoomed=zoomed))
    assert figure.width == FIGURE_WIDTH_PX
    assert 300 < figure.height < 2400
    assert count_colour(figure, GREEN, 40) > 0


def test_regions_and_pictures_have_their_colours(answer):
    boxes = [(10 + 90 * i, 100, 80 + 90 * i, 160) for i in range(6)]
    many = dataclasses.replace(answer, regions=tuple(Region(b, 0.5, 0, (64, 64), 4) for b in boxes))
    figure = plot_answer(many)
    for colour in ACCENTS:
        assert count_colour(figure, colour, 2) > 500
    other = Image.new("RGB", (500, 500), (0, 0, 250))
    first = make_answer()
    both = dataclasses.replace(
        first, images=(first.images[0], other), image_sizes_px=((600, 1200), (500, 500)), notes=("first of 3 pages",)
    )
    assert count_colour(plot_answer(both, image=1), (0, 0, 250)) > 0.9 * 820 * 820
    assert count_colour(plot_answer(both, image=1), MAGENTA) == 0
    assert count_colour(plot_answer(both, image=0), MAGENTA) > 10_000


@pytest.mark.parametrize(
    "text", ["", "x" * 10_000, "word " * 5000, "$\\frac{a}{b}$", "商店 🎉\ud800\x00\n\n\n", "a\n" * 500]
)
def test_any_text(text):
    answer = make_answer(
        text=text, question=text, gate=GateDecision(0.5, 0.1, True, note=text[:300]), notes=(text[:90],)
    )
    figure = plot_answer(answer, coarse_text=text)
    assert figure.width == FIGURE_WIDTH_PX
    assert figure.height < 2400


def test_what_is_missing_is_left_out(answer):
    bare = make_answer(heat_maps=(), timing_ms={}, gate=GateDecision(None, None, True), image_sizes_px=())
    assert plot_answer(bare).width == FIGURE_WIDTH_PX
    unzoomed = make_answer(zoomed=False)
    assert plot_answer(unzoomed, token_px=32).tobytes() != plot_answer(unzoomed).tobytes()
    zoomed = make_answer()  # 320 x 96 px in 30 tokens: 32 px a side
    assert plot_answer(zoomed, token_px=32).tobytes() == plot_answer(zoomed).tobytes()
    for index in (1, -1):
        with pytest.raises(DataError, match=f"picture {index}"):
            plot_answer(answer, image=index)
    with pytest.raises(DataError, match="carries no pictures"):
        plot_answer(dataclasses.replace(answer, images=()))


def test_the_answer_is_left_alone_and_drawn_alike(answer):
    before = answer.images[0].tobytes()
    found = [None] * 4

    def draw(k):
        found[k] = plot_answer(answer).tobytes()

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert answer.images[0].tobytes() == before


@pytest.mark.parametrize("ending", ["png", "PNG", "jpg", "webp", "tiff", "bmp", "gif", "pdf"])
def test_save(answer, tmp_path, ending):
    path = save_plot(answer, tmp_path / "new folder" / f"out.{ending}")
    assert path == tmp_path / "new folder" / f"out.{ending}"
    if ending == "pdf":
        assert path.read_bytes().startswith(b"%PDF")
    else:
        with Image.open(path) as saved:
            assert saved.size == plot_answer(answer).size


def test_answer_methods_draw_and_save(answer, tmp_path):
    assert answer.plot().tobytes() == plot_answer(answer).tobytes()
    path = answer.save(tmp_path / "a.png")
    with Image.open(path) as saved:
        assert saved.tobytes() == plot_answer(answer).tobytes()


def test_save_takes_the_picture_with_the_region(answer, tmp_path):
    plain = Image.new("RGB", (600, 1200), (0, 0, 250))
    second = dataclasses.replace(
        answer, images=(plain, answer.images[0]), regions=(dataclasses.replace(answer.regions[0], image=1),)
    )
    with Image.open(save_plot(second, tmp_path / "a.png")) as saved:
        assert count_colour(saved, MAGENTA) > 10_000
    with Image.open(save_plot(second, tmp_path / "b.png", image=0)) as saved:
        assert count_colour(saved, MAGENTA) == 0


def test_save_refusals(answer, tmp_path):
    for name in ("out", "out.txt", "out.svg"):
        with pytest.raises(DataError, match=r"\.png"):
            save_plot(answer, tmp_path / name)
    (tmp_path / "file").write_text("x")
    for name in ("file/out.png", "a\0b.png"):
        with pytest.raises(DataError, match="choose another place"):
            save_plot(answer, tmp_path / name)
