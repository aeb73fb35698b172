import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest

from qzoom.config import BoxRule
from qzoom.engine.state import State
from qzoom.errors import BudgetError, QuestionError
from qzoom.model import QZoom
from tests import tiny_models

PAGE = tiny_models.picture(51, 400, 300)
QUESTION = "What is the total amount?"
MOST = 4096  # what the tiny models read


def vision_calls(engine: Any, call: Callable[[], object]) -> int:
    """How many patches go through the vision encoder's first block during a call that is refused."""
    seen = []
    block = engine.backbone.model.model.visual.patch_embed
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        call()
    finally:
        handle.remove()
    return sum(seen)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("name", ["coarse_tokens", "region_tokens"])
@pytest.mark.parametrize("budget", [(90_000_000, 99_999_999), (10**30, 10**40), (MOST + 1, MOST + 1)])
def test_absurd_budgets_are_refused_at_once(family, name, budget):
    model = QZoom(tiny_models.engine(family))
    calls: list[Callable[[], object]] = [
        lambda: model.ask(PAGE, QUESTION, **{name: budget}),
        lambda: model.perceive(PAGE, QUESTION, **{name: budget}),
        lambda: model.ask_batch([(PAGE, QUESTION), (PAGE, "When?")], **{name: budget}),
        lambda: model.session(PAGE).ask(QUESTION, region_tokens=budget),
    ]
    if name == "coarse_tokens":
        calls.append(lambda: model.session(PAGE, coarse_tokens=budget))
    for call in calls:
        with pytest.raises(BudgetError, match=rf"at least {budget[0]} visual tokens.*at most {MOST}"):
            call()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_pictures_that_do_not_fit_are_refused_before_they_are_encoded(family):
    engine = tiny_models.engine(family)
    model = QZoom(engine)
    large = (2200, 4000)  # fits by itself, not twice

    def refused() -> None:
        with pytest.raises(QuestionError, match=rf"prompt takes \d{{4}} tokens.*reads at most {MOST}.*coarse_tokens"):
            model.ask([PAGE, PAGE], QUESTION, coarse_tokens=large, max_new_tokens=2)
        with pytest.raises(QuestionError, match=f"reads at most {MOST}"):
            model.session([PAGE, PAGE], coarse_tokens=large)
        with pytest.raises(QuestionError, match=f"reads at most {MOST}"):
            model.ask(PAGE, QUESTION, coarse_tokens=(2200, 2300), max_new_tokens=MOST - 2200)

    assert vision_calls(engine, refused) == 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_arithmetic_is_that_of_the_encoder(family):
    engine = tiny_models.engine(family)
    model = QZoom(engine)
    length = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=1).usage.prompt_tokens
    stream = model.stream(PAGE, QUESTION, zoom="never", max_new_tokens=MOST - length)
    assert next(stream).kind == "perception"
    with pytest.raises(QuestionError, match=f"takes {length} tokens"):
        next(iter(model.stream(PAGE, QUESTION, zoom="never", max_new_tokens=MOST - length + 1)))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_region_is_cut_to_the_room_that_is_left(family):
    model = QZoom(tiny_models.engine(family))
    options: dict[str, Any] = {"zoom": "always", "region_threshold": 0.3, "coarse_tokens": (20, 30)}
    plain = model.ask(PAGE, QUESTION, max_new_tokens=1, region_tokens=(40, 80), **options)
    without = plain.usage.prompt_tokens - plain.usage.region_tokens
    room = 17
    options |= {"region_tokens": (5, 80), "max_new_tokens": MOST - without - room}
    answer = list(model.stream(PAGE, QUESTION, cancel=lambda: True, **options))[-1].answer
    assert answer is not None
    assert 5 <= answer.usage.region_tokens <= room
    assert answer.usage.prompt_tokens == without + answer.usage.region_tokens
    assert plain.usage.region_tokens > room


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_region_that_cannot_be_cut_is_refused_before_it_is_encoded(family):
    engine = tiny_models.engine(family)
    model = QZoom(engine)
    session = model.session(PAGE, coarse_tokens=(20, 30))

    def refused() -> None:
        with pytest.raises(QuestionError, match=rf"reads at most {MOST}.*region_tokens"):
            session.ask(QUESTION, zoom="always", region_threshold=0.3, region_tokens=(60, 80), max_new_tokens=4000)

    assert vision_calls(engine, refused) == 0


def test_of_several_regions_those_that_fit_are_read():
    base = tiny_models.engine("qwen3_vl")
    rule = BoxRule(components="all", max_regions=3, threshold="relative", scaling="exact")
    engine = dataclasses.replace(base, config=base.config.replace(box=rule, region_threshold=0.9))
    model = QZoom(engine)
    pages = [tiny_models.picture(100 + seed, 700, 500) for seed in range(6)]
    page = max(pages, key=lambda p: len(model.perceive(p, QUESTION, coarse_tokens=(30, 60)).regions))
    options: dict[str, Any] = {"zoom": "always", "coarse_tokens": (30, 60), "region_tokens": (1, 9)}
    every = model.ask(page, QUESTION, max_new_tokens=1, **options)
    assert len(every.regions) > 1
    without = every.usage.prompt_tokens - every.usage.region_tokens - 2 * len(every.regions)
    room = 3  # one region's two marks and one token
    last = list(model.stream(page, QUESTION, max_new_tokens=MOST - without - room, cancel=lambda: True, **options))[-1]
    assert last.answer is not None
    assert [r.box for r in last.answer.regions] == [every.regions[0].box]
    assert last.answer.usage.region_tokens == 1


def computed_states() -> int:
    gc.collect()
    return sum(1 for item in gc.get_objects() if type(item) is State and item.hidden.shape[0] > 0)


def test_while_decoding_nothing_of_the_look_is_kept():
    model = QZoom(tiny_models.engine("qwen3_vl"))
    before = computed_states()
    stream = model.stream(PAGE, QUESTION, zoom="always", region_threshold=0.3, max_new_tokens=20)
    assert next(stream).kind == "perception"
    assert computed_states() > before
    while next(stream).kind != "text":
        pass
    assert computed_states() == before
