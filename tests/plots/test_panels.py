import numpy as np
import pytest
from PIL import Image

from qzoom.plots.panels import answer_panel, beside, crop_panel, gate_panel, label, stack, time_panel, tokens_panel
from qzoom.plots.text import ACCENTS, COARSE, INK, TRACK
from qzoom.types import GateDecision, Usage

from .conftest import MAGENTA, count_colour

WIDTH = 800


def longest_run(image, colour):
    """Most pixels of a colour in one row: the filled part of a bar."""
    pixels = np.asarray(image)
    same = (np.abs(pixels[:, :, :3].astype(int) - colour).max(axis=2) <= 2) & (pixels[:, :, 3] > 250)
    return int(same.sum(axis=1).max())


def blocks(*sizes):
    return [Image.new("RGBA", size, (1, 2, 3, 255)) for size in sizes]


def test_stacks_and_labels():
    below = stack(blocks((10, 20), (30, 5)), 7)
    assert below.size == (30, 32)
    assert below.getpixel((20, 28)) == (1, 2, 3, 255)
    assert below.getpixel((20, 10))[3] == 0
    assert beside(blocks((10, 20), (30, 5)), 7).size == (47, 20)
    assert label("x" * 500, WIDTH).width == WIDTH


@pytest.mark.parametrize("score", [0.0, 0.25, 0.83, 1.0])
@pytest.mark.parametrize("zoomed", [True, False])
def test_gate_bar_is_filled_to_the_score(score, zoomed):
    panel = gate_panel(GateDecision(score, 0.1, zoomed), WIDTH)
    assert panel.width == WIDTH
    filled = longest_run(panel, ACCENTS[0] if zoomed else COARSE)
    if score:
        assert filled == pytest.approx(score * WIDTH, abs=30)  # the threshold's mark and round ends take a few pixels
    else:
        assert filled < 60  # only letters
    other = longest_run(panel, COARSE if zoomed else ACCENTS[0])
    assert other == 0


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1.0])
def test_threshold_mark_stands_at_the_threshold(threshold):
    panel = np.asarray(gate_panel(GateDecision(0.0, threshold, False), WIDTH))
    dark = (np.abs(panel[:, :, :3].astype(int) - INK).max(axis=2) <= 2) & (panel[:, :, 3] > 250)
    tall = np.flatnonzero(dark.sum(axis=0) >= 30)
    assert tall.min() == pytest.approx(threshold * (WIDTH - 4), abs=2)


def test_gate_tokens_and_times():
    silent = gate_panel(GateDecision(None, None, True), WIDTH)
    noted = gate_panel(GateDecision(None, None, False, note="The map was empty."), WIDTH)
    assert silent.width == WIDTH
    assert noted.height > silent.height
    assert longest_run(silent, TRACK) == 0
    panel = tokens_panel(Usage(coarse_tokens=200, region_tokens=100), 1000, WIDTH)
    assert longest_run(panel, COARSE) == pytest.approx(0.2 * WIDTH, abs=16)
    assert longest_run(panel, ACCENTS[0]) == pytest.approx(0.1 * WIDTH, abs=4)
    assert longest_run(panel, TRACK) == pytest.approx(0.7 * WIDTH, abs=20)
    panel = tokens_panel(Usage(coarse_tokens=300, region_tokens=100), None, WIDTH)
    assert longest_run(panel, COARSE) == pytest.approx(0.75 * WIDTH, abs=16)
    assert longest_run(panel, TRACK) == 0
    cheap = tokens_panel(Usage(coarse_tokens=300, region_tokens=100), 50, WIDTH)
    assert longest_run(cheap, COARSE) == pytest.approx(0.75 * WIDTH, abs=16)
    assert tokens_panel(Usage(), None, WIDTH).width == WIDTH
    with_total = time_panel({"vision": 5.0, "total": 1234.0}, WIDTH)
    without = time_panel({"vision": 5.0, "decode": 1229.0}, WIDTH)
    assert with_total.width == without.width == WIDTH
    head = 36
    assert with_total.crop((600, 0, WIDTH, head)).tobytes() == without.crop((600, 0, WIDTH, head)).tobytes()


def test_crops_and_answers_keep_their_room():
    crop = Image.new("RGB", (100, 20), MAGENTA)
    panel, place = crop_panel(crop, "Region", WIDTH, 400, ACCENTS[1])
    assert place == (0, 0, 800, 160)
    assert panel.size[0] == WIDTH
    assert count_colour(panel, MAGENTA) > 0.9 * 800 * 160
    assert panel.getpixel((400, 2))[:3] == ACCENTS[1]
    tall, place = crop_panel(Image.new("RGB", (20, 900), MAGENTA), "Region", WIDTH, 400, ACCENTS[1])
    assert tall.height <= 400
    assert place[2] < 20
    short, long = (answer_panel("Answer", t, WIDTH, COARSE) for t in ("33.90", "many words " * 300))
    assert short.width == long.width == WIDTH
    assert short.height < long.height < 400
    assert tuple(short.getpixel((3, short.height // 2))) == (*COARSE, 255)
    assert answer_panel("Answer", " \n", WIDTH, COARSE).height > 60
