"""Decoded pictures are kept: within the bound, per API key, and never past a limit."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from qzoom import QZoom
from qzoom.engine.prefix_cache import prefix_key
from qzoom.errors import ImageError
from qzoom.images.limits import ImageLimits
from qzoom.serving.convert import PictureCache
from qzoom.serving.limits import ServerLimits
from qzoom.serving.scheduler import SchedulerLimits
from tests.serving.running import chat, data_url, image_part, page, running, user

LIMITS = ImageLimits()


def file(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_the_same_bytes_of_the_same_tenant_are_decoded_once() -> None:
    cache = PictureCache(2**22)
    data = file(page())
    first = cache.load(data, LIMITS, "ann")
    assert first.image.tobytes() == page().tobytes()
    assert first.digest == hashlib.sha256(page().tobytes()).digest()
    assert cache.load(bytes(data), LIMITS, "ann") is first
    assert cache.load(data, LIMITS, "bob") is not first
    assert cache.load(file(page("OTHER")), LIMITS, "ann").image.tobytes() == page("OTHER").tobytes()
    assert (cache.hits, cache.misses, cache.entries) == (1, 3, 3)


def test_a_tenants_name_does_not_run_into_the_bytes() -> None:
    cache = PictureCache(2**22)
    data = file(page())
    cache.load(data, LIMITS, "ann")
    with pytest.raises(ImageError):
        cache.load(b"ann\0" + data, LIMITS, "")
    assert cache.load(data, LIMITS, "").image.size == (320, 400)
    assert cache.hits == 0


def test_the_bound_is_kept_and_the_oldest_use_goes() -> None:
    one = 320 * 400 * 4
    cache = PictureCache(2 * one + 1)
    files = [file(page(str(i))) for i in range(3)]
    for i in (0, 1, 0, 2):
        cache.load(files[i], LIMITS, "")
    assert (cache.nbytes, cache.entries) == (2 * one, 2)
    assert [cache.load(data, LIMITS, "").size_px for data in (files[0], files[2])] == [(320, 400)] * 2
    assert cache.hits == 3
    cache.load(files[1], LIMITS, "")
    assert (cache.hits, cache.misses) == (3, 4)
    cache.load(file(page(size=(700, 400))), LIMITS, "")
    assert (cache.nbytes, cache.entries) == (2 * one, 2)


def test_without_memory_nothing_is_kept_or_hashed() -> None:
    cache = PictureCache(0)
    data = file(page())
    first = cache.load(data, LIMITS, "")
    assert cache.load(data, LIMITS, "") is not first
    assert (first.digest, cache.entries, cache.nbytes) == (b"", 0, 0)


def test_a_damaged_picture_is_refused_every_time() -> None:
    cache = PictureCache(2**20)
    data = file(page())[:400]
    for _ in range(2):
        with pytest.raises(ImageError, match="damaged or cut off"):
            cache.load(data, LIMITS, "")
    assert cache.entries == 0


def test_a_known_digest_decides_the_same_prefix(model: QZoom) -> None:
    kept = PictureCache(2**20).load(file(page()), LIMITS, "")
    keys = [prefix_key(model.engine, model.request(picture, "When?"), "ann") for picture in (page(), kept)]
    assert keys[0] == keys[1]
    assert keys[0] != prefix_key(model.engine, model.request(page("OTHER"), "When?"), "ann")


def test_a_second_question_finds_its_picture_and_answers_as_the_library_does(model: QZoom) -> None:
    with running(model, scheduler=SchedulerLimits(cache_bytes=2**24)) as site:
        service = site.service
        prefixes = service.scheduler.cache
        assert service.pictures.max_bytes + prefixes.max_bytes + prefixes.regions.max_bytes == 2**24
        for question in ("What is the date?", "What is the total amount?"):
            body = chat(user(image_part(), question), qzoom={"zoom": "always"})
            reply = httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=120)
            wanted = model.ask(page(), question, zoom="always", max_new_tokens=8)
            message = reply.json()["choices"][0]["message"]
            assert message["content"] == wanted.text
            assert [region["box"] for region in message["qzoom"]["regions"]] == [list(r.box) for r in wanted.regions]
        assert (service.pictures.hits, service.pictures.misses) == (1, 1)
        shown = httpx.get(f"{site.url}/metrics").text
        assert "qzoom:picture_cache_hits_total 1.0" in shown
        assert f"qzoom:picture_cache_bytes {320.0 * 400 * 4}" in shown


@pytest.mark.parametrize(
    ("limits", "status"), [({"total_pixels": 320 * 400 + 1}, 413), ({"total_picture_bytes": 4000}, 413)]
)
def test_a_kept_picture_does_not_evade_the_limits(model: QZoom, limits: dict[str, Any], status: int) -> None:
    data = base64.b64decode(data_url().split(",")[1])
    assert len(data) < 4000 < 3 * len(data)
    with running(model, limits=ServerLimits(**limits)) as site:
        address = f"{site.url}/v1/chat/completions"
        assert httpx.post(address, json=chat(), timeout=120).status_code == 200
        assert site.service.pictures.entries == 1
        again = chat(user(*[image_part()] * 3, "Which?"))
        assert httpx.post(address, json=again, timeout=120).status_code == status
        assert site.service.pictures.hits == 0


def test_two_keys_share_no_picture(model: QZoom) -> None:
    with running(model, api_keys=("ann", "bob")) as site:
        for key in ("ann", "bob", "ann"):
            headers = {"Authorization": f"Bearer {key}"}
            reply = httpx.post(f"{site.url}/v1/chat/completions", json=chat(), headers=headers, timeout=120)
            assert reply.status_code == 200
        assert (site.service.pictures.hits, site.service.pictures.entries) == (1, 2)
