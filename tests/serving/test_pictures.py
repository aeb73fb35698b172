"""Decoded pictures that are kept, and places to decode in."""

import hashlib
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from qzoom.engine.prefix_cache import prefix_key
from qzoom.errors import DeadlineError, ImageError, StoppingError
from qzoom.images.limits import ImageLimits
from qzoom.serving.pictures import PictureCache, Places, ReadingTime
from tests.pdfs import pdf
from tests.serving.running import page

LIMITS = ImageLimits()


def file(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_the_same_bytes_of_the_same_tenant_are_decoded_once():
    cache = PictureCache(2**22)
    data = file(page())
    (first,) = cache.load(data, LIMITS, "ann")
    assert first.image.tobytes() == page().tobytes()
    assert first.digest == hashlib.sha256(page().tobytes()).digest()
    assert cache.load(bytes(data), LIMITS, "ann")[0] is first
    assert cache.load(data, LIMITS, "bob")[0] is not first
    assert cache.load(file(page("OTHER")), LIMITS, "ann")[0].image.tobytes() == page("OTHER").tobytes()
    assert (cache.hits, cache.misses, cache.entries) == (1, 3, 3)
    cache = PictureCache(2**22)
    data = file(page())
    cache.load(data, LIMITS, "ann")
    with pytest.raises(ImageError):
        cache.load(b"ann\0" + data, LIMITS, "")
    assert cache.load(data, LIMITS, "")[0].image.size == (320, 400)
    assert cache.hits == 0


def test_the_bound_is_kept_and_zero_keeps_nothing():
    one = 320 * 400 * 4
    cache = PictureCache(2 * one + 1)
    files = [file(page(str(i))) for i in range(3)]
    for i in (0, 1, 0, 2):
        cache.load(files[i], LIMITS, "")
    assert (cache.nbytes, cache.entries) == (2 * one, 2)
    assert [cache.load(data, LIMITS, "")[0].size_px for data in (files[0], files[2])] == [(320, 400)] * 2
    assert cache.hits == 3
    cache.load(files[1], LIMITS, "")
    assert (cache.hits, cache.misses) == (3, 4)
    cache.load(file(page(size=(700, 400))), LIMITS, "")
    assert (cache.nbytes, cache.entries) == (2 * one, 2)
    cache = PictureCache(0)
    data = file(page())
    (first,) = cache.load(data, LIMITS, "")
    assert cache.load(data, LIMITS, "")[0] is not first
    assert (first.digest, cache.entries, cache.nbytes) == (b"", 0, 0)


def test_damaged_pictures_and_pdfs_hold_nobody_up():
    cache = PictureCache(0, decoders=1)
    with cache.drawers.hold(ReadingTime()), ThreadPoolExecutor(1) as pool:
        (picture,) = pool.submit(cache.load, file(page()), LIMITS, "").result(60)
    assert picture.size_px == (320, 400)
    cache = PictureCache(2**20)
    data = file(page())[:400]
    for _ in range(2):
        with pytest.raises(ImageError, match="damaged or cut off"):
            cache.load(data, LIMITS, "")
    assert cache.entries == 0


def test_a_known_digest_decides_the_same_prefix(model):
    kept = PictureCache(2**20).load(file(page()), LIMITS, "")
    keys = [prefix_key(model.engine, model.request(picture, "When?"), "ann") for picture in (page(), kept)]
    assert keys[0] == keys[1]
    assert keys[0] != prefix_key(model.engine, model.request(page("OTHER"), "When?"), "ann")


def test_no_more_threads_than_places_in_the_order_in_which_they_came():
    places, order, queued = Places(2), [], threading.Semaphore(0)

    class Noted(ReadingTime):
        """Says when its thread stands in the queue."""

        seen = False

        def left_s(self) -> float:
            if not self.seen:
                self.seen = True
                queued.release()
            return super().left_s()

    def work(number: int) -> None:
        with places.hold(Noted()):
            order.append(number)
            go[number].wait(60)

    go = [threading.Event() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        done = []
        for number in range(6):
            done.append(pool.submit(work, number))
            assert queued.acquire(timeout=60)
        for number in range(6):
            go[number].set()
            done[number].result(60)
    assert sorted(order[:2]) == [0, 1]
    assert order[2:] == [2, 3, 4, 5]


def test_waiting_for_a_place_ends_with_the_time_and_with_the_client():
    cache = PictureCache(0, decoders=2)
    gone = ReadingTime()
    with cache.drawers.hold(ReadingTime()), ThreadPoolExecutor(2) as pool:
        late = pool.submit(cache.load, pdf(["a"]), LIMITS, "", reading=ReadingTime(time.monotonic() + 0.2))
        left = pool.submit(cache.load, pdf(["a"]), LIMITS, "", reading=gone)
        with pytest.raises(DeadlineError, match="all the time that a request has"):
            late.result(60)
        assert not left.done()
        gone.cancel()
        with pytest.raises(StoppingError):
            left.result(60)
    assert cache.load(pdf(["a"]), LIMITS, "")[0].format == "PDF"  # the place is free again
