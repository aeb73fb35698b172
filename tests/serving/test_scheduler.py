import dataclasses
import queue
from importlib.util import find_spec
from typing import Any

import pytest

from qzoom.config import RereadRule
from qzoom.engine.cache import KVCache
from qzoom.engine.generate import DecodeBatch
from qzoom.errors import (
    ConfigError,
    DeadlineError,
    InternalError,
    QuestionError,
    QueueFullError,
    QZoomError,
    StoppingError,
)
from qzoom.images.load import LoadedImage
from qzoom.model import QZoom
from qzoom.serving.scheduler import RequestHandle, Scheduler
from qzoom.serving.settings import SchedulerLimits
from qzoom.types import Answer, Perception, StreamEvent
from tests import tiny_models
from tests.faults import SHORT, fail_once

WAIT_S = 120.0
PICTURES = [tiny_models.picture(i, 90 + 37 * i, 220 - 23 * i) for i in range(5)]


class Inbox:
    """A listener that keeps what it is told; `on_text` runs at every piece of text."""

    def __init__(self, on_text: Any = None) -> None:
        self.events: queue.Queue[StreamEvent | QZoomError] = queue.Queue()
        self.seen: list[StreamEvent | QZoomError] = []
        self._on_text = on_text

    def __call__(self, event: StreamEvent | QZoomError) -> None:
        if self._on_text is not None and isinstance(event, StreamEvent) and event.kind == "text":
            self._on_text()
        self.events.put(event)

    def next(self) -> StreamEvent | QZoomError:
        self.seen.append(self.events.get(timeout=WAIT_S))
        return self.seen[-1]

    def end(self) -> Answer | QZoomError:
        while True:
            event = self.next()
            if isinstance(event, QZoomError):
                return event
            if event.answer is not None:
                return event.answer

    def answer(self) -> Answer:
        answer = self.end()
        assert isinstance(answer, Answer), answer
        return answer


@pytest.fixture(scope="module")
def model():
    base = tiny_models.engine("qwen3_vl")
    return QZoom(dataclasses.replace(base, config=base.config.replace(region_threshold=0.45, gate_threshold=0.5)))


@pytest.fixture
def schedulers(model):
    made: list[Scheduler] = []

    def make(start: bool = True, own: QZoom | None = None, **limits: int) -> Scheduler:
        made.append(Scheduler(own or model, SchedulerLimits(**limits)))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close(0.0)


def same(found: Answer, wanted: Answer) -> None:
    assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
    assert found.finish_reason == wanted.finish_reason
    assert [(r.box, r.image, r.tokens) for r in found.regions] == [(r.box, r.image, r.tokens) for r in wanted.regions]
    assert found.gate.zoomed == wanted.gate.zoomed
    assert [item.token for item in found.logprobs] == [item.token for item in wanted.logprobs]
    assert [i.logprob for i in found.logprobs] == pytest.approx([i.logprob for i in wanted.logprobs], abs=1e-4)
    assert dataclasses.replace(found.usage, reused_tokens=0) == wanted.usage


CASES: list[tuple[Any, Any, dict[str, Any]]] = [
    (PICTURES[0], "What is the total?", {"zoom": "always", "max_new_tokens": 9}),
    (PICTURES[1], "When?", {"zoom": "never", "max_new_tokens": 3}),
    (PICTURES[2], "Who?", {"max_new_tokens": 17}),
    (PICTURES[:3], "Which of them?", {"zoom": "always", "max_new_tokens": 5}),
    (None, "Is anybody there?", {"max_new_tokens": 6}),
    (PICTURES[0], "What is the tax?", {"zoom": "always", "max_new_tokens": 4}),
    (PICTURES[0], "What is the tax?", {"max_new_tokens": 8, "temperature": 0.9, "seed": 5}),
    (PICTURES[3], "?", {"gate_threshold": 0.0, "max_new_tokens": 1}),
    (PICTURES[4], "When?", {"coarse_tokens": 9, "zoom": "always", "max_new_tokens": 12}),
    (PICTURES[1], "What is the tax?", {"max_new_tokens": 11, "logprobs": 3, "frequency_penalty": 0.7}),
]
if find_spec("llguidance"):
    SCHEMA = '{"type": "array", "items": {"enum": ["a", "bc", 7]}, "minItems": 4, "maxItems": 6}'
    CASES.append((PICTURES[2], "Which?", {"max_new_tokens": 60, "json_schema": SCHEMA, "logprobs": 0}))
    CASES.append((PICTURES[2], "Which?", {"json_schema": SCHEMA, "temperature": 1.0, "seed": 3, "stop": "7"}))


@pytest.fixture(scope="module")
def wanted(model):
    return [model.ask(image, question, **options) for image, question, options in CASES]


@pytest.mark.parametrize(
    "limits", [{}, {"slots": 2, "time_slice": 3}, {"slots": 1, "prefill_tokens": 1, "time_slice": 1}]
)
def test_answers_equal_those_of_ask(model, wanted, schedulers, limits):
    scheduler = schedulers(**limits)
    inboxes = []
    for image, question, options in [*CASES, *reversed(CASES)]:
        inboxes.append(Inbox())
        scheduler.submit(model.request(image, question, **options), inboxes[-1])
    answers = [inbox.answer() for inbox in inboxes]
    for found, own in zip(answers, [*wanted, *reversed(wanted)], strict=True):
        same(found, own)
    assert sum(found.usage.reused_tokens > 0 for found in answers) >= 6
    assert scheduler.running == scheduler.waiting == 0


@pytest.mark.parametrize("limits", [{}, {"slots": 1, "prefill_tokens": 1, "time_slice": 1}])
def test_answers_that_are_read_again_equal_those_of_ask(model, schedulers, limits):
    again = RereadRule(layer=1, heads=(0, 1), below=1.0, longest=9, least_tokens=1)
    own = QZoom(dataclasses.replace(model.engine, config=model.engine.config.replace(reread=again)))
    scheduler, inboxes = schedulers(own=own, **limits), []
    for image, question, options in CASES:
        inboxes.append(Inbox())
        scheduler.submit(own.request(image, question, **options), inboxes[-1])
    found = [inbox.answer() for inbox in inboxes]
    for inbox, answer, (image, question, options) in zip(inboxes, found, CASES, strict=True):
        same(answer, own.ask(image, question, **options))
        events = [event for event in inbox.seen if isinstance(event, StreamEvent)]
        assert "".join(event.text for event in events) == answer.text
        streamed = [one for event in events if event.kind == "text" for one in event.logprobs]
        assert streamed == list(answer.logprobs)[: len(streamed)]
        assert len(answer.logprobs) - len(streamed) <= 1, "an unfinished character at the end has no text"
    assert sum(any(region.reread for region in answer.regions) for answer in found) >= 2


def test_events_come_in_order(model, schedulers):
    inbox = Inbox()
    schedulers().submit(model.request(PICTURES[0], "What is the total?", zoom="always", max_new_tokens=9), inbox)
    answer = inbox.answer()
    kinds = [event.kind for event in inbox.seen if isinstance(event, StreamEvent)]
    assert (kinds[0], kinds[-1]) == ("perception", "answer")
    assert set(kinds[1:-1]) == {"text"}
    assert "".join(event.text for event in inbox.seen if isinstance(event, StreamEvent)) == answer.text
    assert inbox.events.empty()


def test_perceive_gives_one_perception(model, schedulers):
    scheduler = schedulers()
    first, second = Inbox(), Inbox()
    scheduler.submit(model.request(PICTURES[0], "Where?"), first, perceive=True)
    found = first.next()
    assert isinstance(found, StreamEvent)
    wanted = model.perceive(PICTURES[0], "Where?")
    assert isinstance(found.perception, Perception)
    assert [r.box for r in found.perception.regions] == [r.box for r in wanted.regions]
    assert found.perception.gate.score == pytest.approx(wanted.gate.score, abs=1e-5)
    scheduler.submit(model.request(PICTURES[0], "Where?", max_new_tokens=4, zoom="always"), second)
    answer = second.answer()
    assert answer.usage.reused_tokens > 0
    same(answer, model.ask(PICTURES[0], "Where?", max_new_tokens=4, zoom="always"))
    assert first.events.empty()


def test_a_client_that_leaves_frees_its_place(model, schedulers):
    scheduler = schedulers(slots=1, time_slice=10_000)
    tickets: list[RequestHandle] = []
    long = Inbox(on_text=lambda: [ticket.cancel() for ticket in tickets])
    short = Inbox()
    tickets.append(scheduler.submit(model.request(PICTURES[1], "Tell me all.", max_new_tokens=400, zoom="never"), long))
    scheduler.submit(model.request(PICTURES[1], "When?", max_new_tokens=3, zoom="never"), short)
    left = long.answer()
    assert left.finish_reason == "cancelled"
    # it was cancelled with its first piece of text; what had been held back may follow, another step may not
    assert len([event for event in long.seen if isinstance(event, StreamEvent) and event.kind == "text"]) <= 2
    same(short.answer(), model.ask(PICTURES[1], "When?", max_new_tokens=3, zoom="never"))
    tickets[0].cancel()
    assert long.events.empty()


def test_one_that_leaves_while_it_waits_never_begins(model, schedulers):
    scheduler = schedulers(start=False)
    inbox = Inbox()
    scheduler.submit(model.request(PICTURES[1], "When?"), inbox).cancel()
    scheduler.start()
    assert isinstance(inbox.end(), StoppingError)
    assert [event for event in inbox.seen if isinstance(event, StreamEvent)] == []


def test_long_answers_take_turns_with_short_ones(model, schedulers):
    order: list[str] = []
    scheduler = schedulers(start=False, slots=1, time_slice=4)
    inboxes = {}
    for name, tokens in (("long", 120), ("short", 3), ("other", 5)):
        request = model.request(PICTURES[2], f"{name}?", max_new_tokens=tokens, zoom="never")
        inboxes[name] = Inbox()

        def listen(event: StreamEvent | QZoomError, name: str = name) -> None:
            if isinstance(event, StreamEvent) and event.answer is not None:
                order.append(name)
            inboxes[name](event)

        scheduler.submit(request, listen)
    scheduler.start()
    for name, tokens in (("long", 120), ("short", 3), ("other", 5)):
        same(inboxes[name].answer(), model.ask(PICTURES[2], f"{name}?", max_new_tokens=tokens, zoom="never"))
    assert order == ["short", "other", "long"]


def test_a_full_queue_says_when_to_come_back(model, schedulers):
    scheduler = schedulers(start=False, queue=2)
    inboxes = [Inbox(), Inbox()]
    for inbox in inboxes:
        scheduler.submit(model.request(None, "Hello?", max_new_tokens=2), inbox)
    with pytest.raises(QueueFullError, match=r"2 requests wait already; try again in \d+ s") as caught:
        scheduler.submit(model.request(None, "Hello?", max_new_tokens=2), Inbox())
    assert caught.value.retry_after_s >= 1.0
    assert scheduler.waiting == 2
    scheduler.start()
    for inbox in inboxes:
        same(inbox.answer(), model.ask(None, "Hello?", max_new_tokens=2))


def test_a_deadline_ends_waiting_and_running_requests(model, schedulers):
    scheduler = schedulers(slots=1, time_slice=10_000)
    running, waiting, patient = Inbox(), Inbox(), Inbox()
    long = model.request(PICTURES[1], "Tell me all.", max_new_tokens=3000, zoom="never")
    scheduler.submit(long, running, deadline_s=1.0)
    scheduler.submit(model.request(PICTURES[1], "When?", max_new_tokens=3), waiting, deadline_s=0.001)
    scheduler.submit(model.request(PICTURES[1], "When?", max_new_tokens=3), patient)
    assert isinstance(waiting.end(), DeadlineError)
    assert isinstance(running.end(), DeadlineError)
    same(patient.answer(), model.ask(PICTURES[1], "When?", max_new_tokens=3))
    assert scheduler.running == 0


def test_a_deadline_during_the_second_reading_leaves_the_first_answer(model, schedulers):
    first = RereadRule(layer=1, heads=(0, 1), below=1e-9, longest=9, least_tokens=1)
    once, twice = (
        QZoom(dataclasses.replace(model.engine, config=model.engine.config.replace(reread=rule)))
        for rule in (first, dataclasses.replace(first, below=1.0))
    )
    scheduler = schedulers(own=twice, start=False)
    options = {"zoom": "always", "max_new_tokens": 6}
    inbox = Inbox()
    handle = scheduler.submit(twice.request(PICTURES[0], "What is the total?", **options), inbox, deadline_s=3600.0)
    most = 0

    def run_out() -> None:
        nonlocal most
        if not handle.ended and handle.started:
            most = max(most, scheduler._batch.tokens(handle.key))
            if most == 8:
                handle.deadline = 0.0

    scheduler.submit(twice.request(None, "Tell me all.", max_new_tokens=20), Inbox(run_out))
    scheduler.start()
    answer = inbox.answer()
    wanted = once.ask(PICTURES[0], "What is the total?", **options)
    assert most == 8, "six tokens of the first reading, two of the second"
    assert (answer.tokens, answer.text, answer.finish_reason) == (wanted.tokens, wanted.text, "length")
    assert [region.reread for region in answer.regions] == [False, True]


def test_prefixes_are_never_shared_between_tenants(model, schedulers):
    scheduler = schedulers()

    def ask(tenant: str, picture: Any = PICTURES[0], **options: Any) -> Answer:
        inbox = Inbox()
        scheduler.submit(model.request(picture, "When?", max_new_tokens=2, **options), inbox, tenant=tenant)
        return inbox.answer()

    assert ask("ann").usage.reused_tokens == 0
    assert ask("bob").usage.reused_tokens == 0
    assert ask("ann").usage.reused_tokens > 0
    assert ask("ann", coarse_tokens=9).usage.reused_tokens == 0
    assert ask("ann", picture=PICTURES[1]).usage.reused_tokens == 0
    assert ask("ann", system="Be brief.").usage.reused_tokens == 0
    assert ask("ann").usage.reused_tokens > 0
    assert (scheduler.cache.hits, scheduler.cache.entries) == (2, 5)


def test_the_prefix_cache_keeps_its_bound(model, schedulers):
    measured = schedulers()
    inbox = Inbox()
    measured.submit(model.request(PICTURES[0], "When?", max_new_tokens=2, zoom="never"), inbox)
    inbox.answer()
    one = measured.cache.nbytes
    assert one > 0
    scheduler = schedulers(cache_bytes=int(2.5 * one))
    for picture in (PICTURES[0], PICTURES[0].copy(), PICTURES[0].rotate(180), PICTURES[0].rotate(180).rotate(180)):
        inbox = Inbox()
        scheduler.submit(model.request(picture, "When?", max_new_tokens=2, zoom="never"), inbox)
        same(inbox.answer(), model.ask(picture, "When?", max_new_tokens=2, zoom="never"))
    assert (scheduler.cache.hits, scheduler.cache.nbytes) == (2, 2 * one)
    for turn in range(3):
        inbox = Inbox()
        picture = PICTURES[0].point(lambda value, turn=turn: max(0, value - 1 - turn))
        scheduler.submit(model.request(picture, "When?", max_new_tokens=2, zoom="never"), inbox)
        inbox.answer()
        assert scheduler.cache.nbytes <= int(2.5 * one)
    assert scheduler.cache.entries == 2


def test_one_that_cannot_run_fails_alone(model, schedulers, caplog):
    scheduler = schedulers(start=False, cache_bytes=0)
    good, broken = Inbox(), Inbox()
    request = model.request(PICTURES[0], "When?", max_new_tokens=3)
    scheduler.submit(request, good)
    # a picture that says it is one and is none: an unforeseen error, deep inside the group's look
    lie = LoadedImage("no picture", PICTURES[0].size)
    scheduler.submit(dataclasses.replace(request, pictures=(lie,)), broken)
    scheduler.start()
    same(good.answer(), model.ask(PICTURES[0], "When?", max_new_tokens=3))
    error = broken.end()
    assert isinstance(error, InternalError)
    assert "no picture" not in str(error)
    assert "failed" in caplog.text


def test_requests_that_find_no_memory_to_join_together_join_alone(model, schedulers, monkeypatch):
    failed = fail_once(monkeypatch, KVCache, "stack", lambda caches, _, extra=0: extra > 0 and len(caches) == 3)
    scheduler, inboxes, left = schedulers(start=False), [Inbox(), Inbox()], CASES[4:6]

    def two_more() -> None:
        while left:
            image, question, options = left.pop()
            scheduler.submit(model.request(image, question, **options), inboxes[len(left)])

    long = Inbox(two_more)
    scheduler.submit(model.request(PICTURES[1], "Tell me all.", max_new_tokens=20, zoom="never"), long)
    scheduler.start()
    for inbox, (image, question, options) in zip(inboxes, CASES[4:6], strict=True):
        same(inbox.answer(), model.ask(image, question, **options))
    same(long.answer(), model.ask(PICTURES[1], "Tell me all.", max_new_tokens=20, zoom="never"))
    assert failed


@pytest.mark.parametrize("what", ["step", "resume"])
def test_a_batch_that_fails_ends_what_it_answers_and_the_worker_goes_on(what, model, schedulers, monkeypatch, caplog):
    failed = fail_once(monkeypatch, DecodeBatch, what)
    scheduler, inboxes = schedulers(start=False, slots=1, time_slice=2), [Inbox(), Inbox()]
    for (image, question, options), inbox in zip(CASES[4:6], inboxes, strict=True):
        scheduler.submit(model.request(image, question, **options), inbox)
    scheduler.start()
    first, second = (inbox.end() for inbox in inboxes)
    assert isinstance(first, InternalError)
    assert SHORT not in str(first)
    assert SHORT in caplog.text
    assert isinstance(second, Answer)
    same(second, model.ask(CASES[5][0], CASES[5][1], **CASES[5][2]))
    later = Inbox()
    scheduler.submit(model.request(CASES[4][0], CASES[4][1], **CASES[4][2]), later)
    same(later.answer(), model.ask(CASES[4][0], CASES[4][1], **CASES[4][2]))
    assert failed
    assert scheduler.running == 0


def test_a_request_that_cannot_fit_is_refused_at_once(model, schedulers):
    with pytest.raises(QuestionError, match="but the model reads at most"):
        schedulers(start=False).submit(model.request(None, "Hello?", max_new_tokens=10**6), Inbox())


def test_closing_lets_the_taken_ones_finish(model, schedulers):
    scheduler = schedulers(start=False, slots=1)
    inboxes = [Inbox(), Inbox()]
    for inbox in inboxes:
        scheduler.submit(model.request(PICTURES[2], "When?", max_new_tokens=5), inbox)
    scheduler.start()
    assert scheduler.alive
    assert scheduler.heartbeat_age_s < 60
    scheduler.close(WAIT_S)
    for inbox in inboxes:
        same(inbox.answer(), model.ask(PICTURES[2], "When?", max_new_tokens=5))
    assert not scheduler.alive
    with pytest.raises(StoppingError, match="shutting down"):
        scheduler.submit(model.request(None, "Hello?"), Inbox())


def test_closing_at_once_ends_everything(model, schedulers):
    scheduler = schedulers(slots=1, time_slice=10_000)
    running, waiting = Inbox(), Inbox()
    scheduler.submit(model.request(PICTURES[2], "Tell me all.", max_new_tokens=3000, zoom="never"), running)
    scheduler.submit(model.request(PICTURES[2], "When?", max_new_tokens=3), waiting)
    assert isinstance(running.next(), StreamEvent)
    scheduler.close(0.0)
    assert running.answer().finish_reason == "cancelled"
    assert isinstance(waiting.end(), StoppingError)


@pytest.mark.parametrize(("name", "value"), [("slots", 0), ("queue", -1), ("time_slice", True), ("cache_bytes", 1.5)])
def test_bad_limits_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least"):
        SchedulerLimits(**{name: value})
