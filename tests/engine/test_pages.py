import base64
import dataclasses
import io

import pytest
from PIL import Image

from qzoom.config import TokenBudget
from qzoom.engine.request import share_among_pages
from qzoom.errors import ConfigError
from qzoom.images.load import load_image, load_pictures
from qzoom.model import QZoom
from tests import tiny_models
from tests.pdfs import pdf

THREE = pdf(["a", "b", "c"])
PHOTO = tiny_models.picture(44, 120, 90)


@pytest.fixture(scope="module")
def model():
    return QZoom(tiny_models.engine("qwen3_vl"), "random")


@pytest.mark.parametrize(
    ("whole", "pages", "share"),
    [
        ((64, 144), 1, (64, 144)), ((64, 144), 2, (64, 72)), ((64, 144), 5, (64, 64)), ((4, 16384), 20, (4, 819)),
        ((4, 576), 20, (4, 64)), ((4, 30), 20, (4, 30)), ((100, 400), 20, (100, 100)),
    ],
)  # fmt: skip
def test_shares(whole, pages, share):
    assert share_among_pages(TokenBudget(*whole), pages) == TokenBudget(*share)


def test_pages_are_pictures_of_one_question(model):
    answer = model.ask([THREE, PHOTO], "?", zoom="always", coarse_tokens=(4, 120), max_new_tokens=2)
    assert list(answer.image_sizes_px) == [(834, 556)] * 3 + [PHOTO.size]
    assert len(answer.heat_maps) == 4
    cells = [heat_map.values.size for heat_map in answer.heat_maps]
    assert max(cells[:3]) <= 64
    assert answer.usage.coarse_tokens == sum(cells)
    assert answer.notes[0].startswith("all 3 pages of the PDF")


def test_regions_name_page_and_points(model):
    found = model.perceive(THREE, "?", pages="2-3", region_threshold=0.0)
    (region,) = found.regions
    assert region.page == region.image + 2
    assert region.box_pt == tuple(round(value * 72 / 200, 1) for value in region.box)
    assert region.to_dict()["page"] == region.page
    assert region.to_dict()["box_pt"] == list(region.box_pt)
    (plain,) = model.perceive(PHOTO, "?", region_threshold=0.0).regions
    assert "page" not in plain.to_dict()


def test_batches_and_sessions_agree(model):
    exact = QZoom(dataclasses.replace(model.engine))
    fresh = exact.ask(THREE, "When?", zoom="always", pages="1-2")
    (batched, _) = exact.ask_batch([(THREE, "When?"), (PHOTO, "?")], zoom="always", pages=["1-2", ""])
    kept = exact.session(THREE, pages="1-2").ask("When?", zoom="always")
    for other in (batched, kept):
        assert (other.text, other.regions) == (fresh.text, fresh.regions)
        assert other.usage.coarse_tokens == fresh.usage.coarse_tokens


def test_openais_parts_and_one_page(model):
    url = "data:application/pdf;base64," + base64.b64encode(THREE).decode()
    for part in ({"type": "file", "file": {"file_data": url}}, {"type": "image_url", "image_url": {"url": url}}):
        messages = [{"role": "user", "content": [{"type": "text", "text": "When?"}, part]}]
        assert len(model.request(None, messages, pages="1,3").pictures) == 2
    page = load_pictures(THREE)[1]
    alone = model.ask(page, "?", zoom="never", max_new_tokens=1)
    drawn = model.ask(page.image, "?", zoom="never", max_new_tokens=1)
    assert alone.usage.coarse_tokens == drawn.usage.coarse_tokens
    assert load_image(io.BytesIO(THREE)).page is not None


def test_wrong_pages_are_one_sentence(model):
    with pytest.raises(ConfigError, match="has 3 pages, so there is no page 4"):
        model.ask(THREE, "?", pages="4")
    with pytest.raises(ConfigError, match="Sample 2: Pages '2' can be chosen of a PDF only"):
        model.ask_batch([(THREE, "?"), (Image.new("RGB", (40, 40)), "?")], pages="2")
