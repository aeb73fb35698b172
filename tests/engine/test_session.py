import dataclasses
import threading
from typing import Any

import pytest

from qzoom.config import BoxRule, TokenBudget
from qzoom.errors import BudgetError, QuestionError
from qzoom.images.load import LoadedImage
from qzoom.model import QZoom
from qzoom.types import Answer
from tests import tiny_models

PAGES = [tiny_models.picture(61, 300, 200), tiny_models.picture(62, 90, 260), tiny_models.picture(63, 400, 60)]
QUESTIONS = ["What is the total?", "When?", "Who is the company, and what did they sell to whom?", "?", "When?"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"zoom": "always"},
    {"zoom": "never"},
    {"gate_threshold": 0.0},
    {"zoom": "always", "region_threshold": 1.0},
]


def made(family: str, positions: str = "second_image", **more: Any) -> QZoom:
    base = tiny_models.engine(family)
    config = base.config.replace(positions=positions, region_threshold=0.45, **more)
    return QZoom(dataclasses.replace(base, config=config))


def assert_same(found: Answer, fresh: Answer) -> None:
    assert found.tokens == fresh.tokens
    assert found.text == fresh.text
    assert found.gate.zoomed == fresh.gate.zoomed
    assert found.gate.note == fresh.gate.note
    assert (found.gate.score is None) == (fresh.gate.score is None)
    if fresh.gate.score is not None:
        assert found.gate.score == pytest.approx(fresh.gate.score, abs=1e-5)
    assert [(r.box, r.image, r.tokens) for r in found.regions] == [(r.box, r.image, r.tokens) for r in fresh.regions]
    for one, other in zip(found.heat_maps, fresh.heat_maps, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-5)
    assert dataclasses.replace(found.usage, reused_tokens=0) == fresh.usage
    assert found.image_sizes_px == fresh.image_sizes_px


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
@pytest.mark.parametrize("count", [1, 3])
def test_later_answers_equal_fresh_calls(family, positions, count):
    model = made(family, positions)
    pictures = PAGES[:count]
    session = model.session(pictures)
    outcomes = set()
    for question, options in zip(QUESTIONS, OPTIONS, strict=True):
        found = session.ask(question, max_new_tokens=7, **options)
        assert_same(found, model.ask(pictures, question, max_new_tokens=7, **options))
        outcomes.add(found.gate.zoomed)
        assert found.usage.reused_tokens > 0
    assert outcomes == {True, False}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
def test_a_system_turn_and_several_regions_of_several_pictures(family, positions):
    rule = BoxRule(components="all", max_regions=4, threshold="relative", scaling="exact", margin_cells=1)
    model = made(family, positions, box=rule)
    session = model.session(PAGES, system="Answer in one word.", coarse_tokens=40)
    seen = set()
    for question in QUESTIONS:
        options = {"zoom": "always", "region_threshold": 0.8, "region_tokens": 30, "max_new_tokens": 5}
        found = session.ask(question, **options)
        fresh = model.ask(PAGES, question, system="Answer in one word.", coarse_tokens=40, **options)
        assert_same(found, fresh)
        seen |= {r.image for r in found.regions}
    assert len(seen) > 1


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_reused_tokens_are_the_prefix_up_to_the_first_region(family):
    model = made(family)
    session = model.session(PAGES[:2])
    spans = session.prefix.prompt.spans
    plain = session.ask("When?", zoom="never", max_new_tokens=1)
    assert plain.usage.reused_tokens == spans[1].stop + 1 == len(session.prefix.prompt)
    zoomed = session.ask("When?", zoom="always", max_new_tokens=1)
    assert zoomed.usage.reused_tokens == spans[zoomed.regions[0].image].stop + 1
    assert model.ask(PAGES[:2], "When?", max_new_tokens=1).usage.reused_tokens == 0


@pytest.mark.parametrize("own", [None, TokenBudget(9, 9)])
def test_a_sessions_coarse_budget_also_bounds_its_regions(own):
    model = made("qwen3_vl", coarse_tokens=own)
    session = model.session(PAGES[0], coarse_tokens=(12, 16))
    found = session.ask("When?", zoom="always", max_new_tokens=3)
    fresh = model.ask(PAGES[0], "When?", zoom="always", coarse_tokens=(12, 16), max_new_tokens=3)
    assert_same(found, fresh)
    assert found.gate.zoomed
    assert 12 <= found.usage.region_tokens <= 16


def test_questions_leave_the_prefix_as_it_was():
    session = made("qwen3_vl").session(PAGES[0])
    before = session.ask("When?", zoom="always", max_new_tokens=6)
    length = session.prefix.shared.length
    for question, options in zip(QUESTIONS, OPTIONS, strict=True):
        session.ask(question, max_new_tokens=9, **options)
    after = session.ask("When?", zoom="always", max_new_tokens=6)
    assert before.tokens == after.tokens
    assert session.prefix.shared.length == length == len(session.prefix.shared.cache)


def test_streaming_and_perceiving_in_a_session():
    model = made("qwen2_5_vl")
    session = model.session(PAGES[0])
    events = list(session.stream("When?", zoom="always", max_new_tokens=6))
    assert [events[0].kind, events[-1].kind] == ["perception", "answer"]
    assert "".join(e.text for e in events[1:-1]) == events[-1].answer.text
    seen = session.perceive("When?")
    fresh = model.perceive(PAGES[0], "When?")
    assert seen.gate.score == pytest.approx(fresh.gate.score, abs=1e-5)
    assert [r.box for r in seen.regions] == [r.box for r in fresh.regions]
    assert session.ask("When?", cancel=lambda: True, max_new_tokens=6).finish_reason == "cancelled"


def in_threads(jobs: list[Any]) -> list[Any]:
    """Run callables at the same time; their results in order."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def work(i: int) -> None:
        barrier.wait(timeout=60)
        results[i] = jobs[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    return results


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_two_sessions_in_two_threads_do_not_disturb_each_other(family):
    model = made(family, "aligned")
    systems = (None, "Answer in one word.")

    def answers(i: int) -> list[tuple[Any, ...]]:
        session = model.session(PAGES[i : i + 2], system=systems[i])
        out = []
        for question, options in list(zip(QUESTIONS, OPTIONS, strict=True)) * 2:
            answer = session.ask(question, max_new_tokens=8, **options)
            out.append((answer.tokens, answer.gate, [r.box for r in answer.regions], answer.usage))
        return out

    serial = [answers(0), answers(1)]
    assert in_threads([lambda: answers(0), lambda: answers(1)]) == serial


def test_one_session_asked_from_several_threads():
    session = made("qwen3_vl").session(PAGES[0])

    def ask(i: int) -> tuple[int, ...]:
        return session.ask(QUESTIONS[i], max_new_tokens=8, **OPTIONS[i]).tokens

    serial = [ask(i) for i in range(5)]
    assert in_threads([lambda i=i: ask(i) for i in range(5)]) == serial


def test_fresh_questions_in_threads_equal_serial_ones():
    model = made("qwen2_5_vl")

    def ask(i: int) -> tuple[int, ...]:
        return model.ask(PAGES[i % 3], QUESTIONS[i], max_new_tokens=8, **OPTIONS[i]).tokens

    serial = [ask(i) for i in range(5)]
    assert in_threads([lambda i=i: ask(i) for i in range(5)]) == serial


def test_what_a_session_refuses():
    model = made("qwen3_vl")
    with pytest.raises(QuestionError, match="at least one picture"):
        model.session([])
    session = model.session(PAGES[0])
    with pytest.raises(QuestionError, match="coarse"):
        session.ask("When?", coarse_tokens=50)
    with pytest.raises(QuestionError, match="text"):
        session.ask([{"role": "user", "content": "When?"}])
    with pytest.raises(QuestionError, match="empty"):
        session.ask("   ")
    with pytest.raises(BudgetError):
        session.ask("When?", region_tokens=(9, 3))
    assert isinstance(session.pictures[0], LoadedImage)
