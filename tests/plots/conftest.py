"""Answers made up for drawing; their pictures have colours that the figures use nowhere else."""

import numpy as np
import pytest
from PIL import Image

from qzoom.types import Answer, GateDecision, HeatMap, Region, Usage

MAGENTA, GREEN = (255, 0, 255), (0, 160, 0)


def make_answer(size=(600, 1200), box=(300, 800, 500, 860), zoomed=True, **changes):
    """A green page whose region is magenta."""
    page = Image.new("RGB", size, GREEN)
    page.paste(MAGENTA, box)
    values = np.zeros((12, 6), np.float32)
    values[8, 4] = 0.9
    regions = (Region(box, 0.9, 0, (320, 96), 30),) if zoomed else ()
    fields = {
        "text": "33.90", "tokens": (1, 2), "gate": GateDecision(0.8 if zoomed else 0.04, 0.1, zoomed),
        "regions": regions, "heat_maps": (HeatMap(values),), "usage": Usage(72, 30 if zoomed else 0, 150, 2),
        "timing_ms": {"vision": 30.0, "decode": 50.0, "total": 90.0}, "image_sizes_px": (size,),
        "question": "What is the total?", "images": (page,),
    }  # fmt: skip
    return Answer(**(fields | changes))


def count_colour(image, colour, tolerance=6):
    pixels = np.asarray(image.convert("RGB"), np.int16)
    return int((np.abs(pixels - np.array(colour)).max(axis=2) <= tolerance).sum())


@pytest.fixture
def answer():
    return make_answer()
