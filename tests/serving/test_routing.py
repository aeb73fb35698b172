import random
from collections import Counter

import pytest

from qzoom import QZoom
from qzoom.serving.routing import SLACK, choose, picture_key, rank
from tests.serving.running import page

NAMES = [f"engine-{i}" for i in range(4)]


def test_a_picture_keeps_its_order_and_a_lost_engine_moves_only_its_own():
    keys = [f"picture-{i}".encode() for i in range(400)]
    first = {key: rank(key, NAMES)[0] for key in keys}
    assert {key: rank(key, reversed(NAMES))[0] for key in keys} == first
    assert min(Counter(first.values()).values()) > 60
    without = {key: rank(key, NAMES[1:])[0] for key in keys}
    assert all(without[key] == first[key] for key in keys if first[key] != NAMES[0])


@pytest.mark.parametrize("slow", [None, "engine-2"])
def test_repeated_pictures_find_their_engine_and_the_load_stays_even(slow):
    """A simulation: 16 clients, 4 engines, popular pictures; one engine may be four times slower than the others."""
    draw = random.Random(3)
    weights = [1 / (i + 1) for i in range(60)]
    loads, has, sent = dict.fromkeys(NAMES, 0), {name: set[int]() for name in NAMES}, Counter[str]()
    jobs: list[tuple[float, str]] = []
    repeats = hits = 0
    now = 0.0
    for _ in range(3000):
        if len(jobs) == 16:
            jobs.sort()
            now, ended = jobs.pop(0)
            loads[ended] -= 1
        picture = draw.choices(range(60), weights)[0]
        name = choose(str(picture).encode(), loads)
        assert loads[name] < max(2, SLACK * (sum(loads.values()) + 1) / 4 + 1)
        if any(picture in kept for kept in has.values()):
            repeats += 1
            hits += picture in has[name]
        has[name].add(picture)
        sent[name] += 1
        loads[name] += 1
        jobs.append((now + draw.expovariate(1.0) * (4 if name == slow else 1), name))
    assert hits / repeats >= 0.9
    assert max(sent.values()) <= 1.5 * 3000 / 4


def test_the_key_is_the_pictures_of_a_tenant():
    model = QZoom.from_pretrained("tiny")
    one, other = page("TOTAL 3.55"), page("TOTAL 4.55")
    key = picture_key(model.request(one, "What is the date?"), "a")
    assert picture_key(model.request(one.copy(), "Who signed?"), "a") == key
    assert picture_key(model.request(other, "What is the date?"), "a") != key
    assert picture_key(model.request(one, "What is the date?"), "b") != key
    text = [{"role": "user", "content": "What is the date?"}]
    assert picture_key(model.request(None, text)) == picture_key(model.request(None, text))
