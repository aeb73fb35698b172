import base64
import dataclasses
import email.utils
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom.errors import BudgetSpentError, CallRefusedError, ConfigError, EndpointError, LaterError, StopRunError
from qzoom.llm.cache import CallCache, Failure, Reply
from qzoom.llm.client import ChatImage, Client, Message, SharedClient, call_key, read_reply, wire
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling
from tests.llm.stub import Stub, always, completion, nobody, serve, text_of

FAST = CallSettings(retries=5, backoff_s=0.001, longest_s=5.0)


def chat(text: str = "Q?") -> list[Message]:
    return [("user", (text,))]


@contextmanager
def client_at(
    folder: Path, *urls: str, calls: CallSettings = FAST, name: str = "one", **endpoint: Any
) -> Iterator[Client]:
    shared = SharedClient(CallCache(folder / "calls.sqlite"), calls)
    endpoints = [EndpointSettings(url, "m", **endpoint) for url in urls]
    try:
        yield Client("teacher", name, endpoints, Sampling(), shared)
    finally:
        shared.close()


def test_it_sends_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    stub = Stub(always("A4"))
    with (
        serve(stub) as url,
        client_at(tmp_path, url, key_env="MY_KEY", extra_body={"qzoom": {"zoom": "never"}}) as client,
    ):
        reply = client.call(chat(), 3)
    assert (reply.text, reply.model, reply.prompt_tokens, reply.completion_tokens) == ("A4", "stub-1", 100, 10)
    assert stub.bodies == [
        {
            "model": "m", "messages": [{"role": "user", "content": "Q?"}], "temperature": 0.7, "top_p": 0.9,
            "max_tokens": 1024, "seed": 3, "qzoom": {"zoom": "never"},
        }
    ]  # fmt: skip
    assert stub.headers[0]["authorization"] == "Bearer secret"


def test_keys_meant_for_another_api_stay_at_home(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-secret")
    stub = Stub(always("A4"))
    with serve(stub) as url, client_at(tmp_path, url) as client:
        client.check()
        client.call(chat())
    assert "authorization" not in stub.headers[0]
    assert "another-secret" not in str(stub.headers)


def test_nothing_is_paid_twice(tmp_path):
    stub = Stub(always("A4"))
    with serve(stub) as url:
        with client_at(tmp_path, url) as client:
            assert client.call(chat()).text == client.call(chat()).text == "A4"
            client.call(chat(), 1)
        with client_at(tmp_path, url) as client:
            client.call(chat(), 1)
            client.call(chat("Other?"))
            costs = client.shared.cache.costs()
        with client_at(tmp_path, url, name="two") as client:
            client.call(chat())  # another member may be another model under the same name
    assert sorted(stub.asked.values()) == [1, 1, 2]
    assert [(cost.url == "", cost.requests, cost.kept) for cost in costs] == [(True, 0, 2), (False, 3, 0)]


def test_many_threads_pay_once(tmp_path):
    stub = Stub(lambda body, before: time.sleep(0.02) or "A4")
    with serve(stub) as url, client_at(tmp_path, url) as client, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: client.call(chat(f"Q{i % 5}?")).text, range(40)))
    assert texts == ["A4"] * 40
    assert list(stub.asked.values()) == [1] * 5


@pytest.mark.parametrize(
    "fault", [(429, {"Retry-After": "0"}), (500, {}), (503, {}), (408, {}), "drop", b"nonsense", b'{"choices": []}']
)
def test_what_may_pass_is_tried_again(tmp_path, fault):
    stub = Stub(lambda body, before: "A4" if before == 2 else fault)
    with serve(stub) as url, client_at(tmp_path, url) as client:
        assert client.call(chat()).text == "A4"
        costs = client.shared.cache.costs()
    assert [(cost.requests, cost.failures) for cost in costs] == [(3, 2)]


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_is_too_slow_once_is_tried_again(tmp_path, fault):
    stub = Stub(lambda body, before: "A4" if before else fault)
    with serve(stub) as url, client_at(tmp_path, url, timeout_s=1.0) as client:
        assert client.call(chat()).text == "A4"
        assert client.shared.cache.costs()[0].failures >= 1


def test_a_server_that_drips_for_ever_is_left_in_time(tmp_path):
    stub = Stub(always("drip"))
    calls = CallSettings(retries=0, backoff_s=0.001)
    late = pytest.raises(LaterError, match=r"no full reply within 0.5 s")
    with serve(stub) as url, client_at(tmp_path, url, timeout_s=0.5, calls=calls) as client, late:
        client.call(chat())


def test_what_does_not_pass_waits_for_later_and_is_not_stored(tmp_path):
    stub = Stub(lambda body, before: (500, {}) if before < 6 else "A4")
    with serve(stub) as url, client_at(tmp_path, url) as client:
        with pytest.raises(LaterError, match=r"teacher 'one' gave no answer .tries: 6, last at .*: HTTP 500"):
            client.call(chat())
        assert client.call(chat()).text == "A4"
    assert list(stub.asked.values()) == [7]


def test_an_endpoint_that_stays_down_ends_the_run(tmp_path):
    calls = CallSettings(retries=1, backoff_s=0.001)
    with nobody() as url, client_at(tmp_path, url, calls=calls) as client:
        for _ in range(2):
            with pytest.raises(LaterError):
                client.call(chat())
        with pytest.raises(EndpointError, match=r"3 calls in a row.*run again when it is up"):
            client.call(chat())


def test_retry_after_is_obeyed_by_all_calls(tmp_path):
    stub = Stub(lambda body, before: (429, {"Retry-After": "1"}) if len(stub.bodies) == 1 else "A4")
    with serve(stub) as url, client_at(tmp_path, url) as client:
        client.call(chat("first"))
        client.call(chat("second"))
    assert stub.times[1] - stub.times[0] >= 1.0


def test_a_pause_that_is_too_long_leaves_the_call_for_later(tmp_path):
    stub = Stub(always((429, {"Retry-After": "3600"})))
    with serve(stub) as url, client_at(tmp_path, url) as client:
        for text in ("first", "second"):
            with pytest.raises(LaterError, match=r"tries: 1, last at .*HTTP 429|longer pause than longest_s"):
                client.call(chat(text))
    assert len(stub.bodies) == 1


def test_calls_go_round_and_on_to_the_next(tmp_path, monkeypatch):
    def no_pause(seconds: float) -> None:
        assert seconds <= 0, "it paused while another endpoint was free"

    good, bad, third = Stub(always("A4")), Stub(always((500, {}))), Stub(always("A4"))
    calls = CallSettings(retries=3, backoff_s=60.0, longest_s=60.0)
    with (
        serve(good) as one,
        serve(bad) as two,
        serve(third) as three,
        client_at(tmp_path, one, two, three, calls=calls) as client,
    ):
        monkeypatch.setattr(client.shared.cache, "pause", no_pause)
        for i in range(9):
            assert client.call(chat(f"Q{i}?")).text == "A4"
    assert (len(good.bodies), len(bad.bodies), len(third.bodies)) == (3, 3, 6)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ((401, {}), r"refuses the key \(HTTP 401\)"),
        ((403, {}), r"refuses the key \(HTTP 403\)"),
        ((404, {}), "does not know the model or the address"),
        ((400, {}, b'{"error": {"message": "m", "code": "model_not_found"}}'), "does not know the model"),
        ((307, {"Location": "http://127.0.0.1:9/v1"}), "HTTP 307"),
    ],
)
def test_what_cannot_pass_stops_at_once_and_says_who_where_and_why(tmp_path, fault, reason):
    stub = Stub(always(fault))
    with serve(stub) as url, client_at(tmp_path, url) as client, pytest.raises(StopRunError, match=reason) as failure:
        client.call(chat())
    assert f"The teacher 'one' at {url}" in str(failure.value)
    assert "Check url, model" in str(failure.value)
    assert len(stub.bodies) == 1


def test_refused_calls_are_kept_as_refused(tmp_path):
    stub = Stub(lambda body, before: (413, {}) if text_of(body) == "long" else "A4")
    with serve(stub) as url:
        for _ in range(2):
            with client_at(tmp_path, url) as client:
                client.call(chat())
                with pytest.raises(CallRefusedError, match="HTTP 413: no"):
                    client.call(chat("long"))
    assert list(stub.asked.values()) == [1, 1]


def test_an_endpoint_that_only_refuses_is_no_use(tmp_path):
    stub = Stub(always((422, {})))
    with serve(stub) as url:
        with client_at(tmp_path, url) as client:
            for i in (0, 1, 1):
                with pytest.raises(CallRefusedError):
                    client.call(chat(f"Q{i}?"))
            with pytest.raises(EndpointError, match=r"refuses every request \(HTTP 422: no\)"):
                client.call(chat("Q2?"))
            costs = client.shared.cache.costs()
        assert [(cost.requests, cost.failures, cost.kept) for cost in costs] == [(0, 0, 1), (3, 3, 0)]
        stub.answer = always("A4")  # it was set up wrongly and is repaired
        with client_at(tmp_path, url) as client:
            assert [client.call(chat(f"Q{i}?")).text for i in range(3)] == ["A4"] * 3
    assert list(stub.asked.values()) == [2, 2, 2]


def test_first_refusals_are_stored_with_the_first_reply(tmp_path):
    stub = Stub(lambda body, before: (413, {}) if text_of(body).startswith("long") else "A4")
    texts = ("long 1", "long 2", "short", "long 3")
    with serve(stub) as url:
        for _ in range(2):
            with client_at(tmp_path, url) as client:
                for text in texts:
                    with nullcontext() if text == "short" else pytest.raises(CallRefusedError, match="HTTP 413: no"):
                        client.call(chat(text))
                costs = client.shared.cache.costs()
    assert list(stub.asked.values()) == [1] * 4
    assert [(cost.requests, cost.failures, cost.kept) for cost in costs] == [(0, 0, 4), (4, 3, 0)]


@pytest.mark.parametrize("usage", [(100, 10), (0, 0)])  # not every endpoint counts tokens
def test_an_endpoint_that_answered_in_an_earlier_run_may_refuse_many_calls(tmp_path, usage):
    stub = Stub(lambda body, before: (400, {}) if text_of(body).startswith("long") else "A4", usage=usage)
    with serve(stub) as url:
        with client_at(tmp_path, url) as client:
            client.call(chat("short"))
        for _ in range(2):
            with client_at(tmp_path, url) as client:
                for i in range(4):
                    with pytest.raises(CallRefusedError, match="HTTP 400: no"):
                        client.call(chat(f"long {i}"))
    assert list(stub.asked.values()) == [1] * 5


def test_refusals_of_one_endpoint_are_not_stored_because_another_answers(tmp_path):
    wrong, right = Stub(always((400, {}))), Stub(always("A4"))
    with serve(wrong) as first, serve(right) as second:
        with client_at(tmp_path, first, second) as client:
            with pytest.raises(CallRefusedError):
                client.call(chat("Q0?"))
            assert client.call(chat("Q1?")).text == "A4"
        wrong.answer = always("A4")
        with client_at(tmp_path, first, second) as client:
            assert client.call(chat("Q0?")).text == "A4"
    assert (len(wrong.bodies), len(right.bodies)) == (2, 1)


def test_down_from_the_start_is_found_before_any_call(tmp_path, monkeypatch):
    with serve(Stub(always("x"))) as url, client_at(tmp_path, url) as client:
        client.check()
    down = pytest.raises(StopRunError, match=r"The teacher 'one' at http://\S+ is down: no connection")
    with nobody() as url, client_at(tmp_path, url) as client, down:
        client.check()
    with (
        serve(Stub(always("x"), models_status=401)) as url,
        client_at(tmp_path, url) as client,
        pytest.raises(StopRunError, match=r"refuses the key \(HTTP 401\)"),
    ):
        client.check()
    with serve(Stub(always("x"), models_status=404)) as url, client_at(tmp_path, url) as client:
        client.check()  # not all servers list models
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with (
        serve(Stub(always("x"))) as url,
        client_at(tmp_path, url, key_env="NO_SUCH_KEY") as client,
        pytest.raises(StopRunError, match="environment variable NO_SUCH_KEY holds no key"),
    ):
        client.check()
    monkeypatch.setenv("NO_SUCH_KEY", "sk-\N{HORIZONTAL ELLIPSIS}")
    with serve(Stub(always("x"))) as url, client_at(tmp_path, url, key_env="NO_SUCH_KEY") as client:
        for ask in (client.check, lambda: client.call(chat())):
            with pytest.raises(ConfigError, match="The key in NO_SUCH_KEY has characters"):
                ask()


def test_budgets_in_requests_and_money(tmp_path):
    stub = Stub(always("A4"), usage=(1000, 100))
    prices = {"prompt_price": 0.5, "completion_price": 5.0}
    with serve(stub) as url:
        calls = CallSettings(budget_requests=2)
        with client_at(tmp_path, url, calls=calls, **prices) as client:
            client.call(chat("a"))
            client.call(chat("b"))
            with pytest.raises(BudgetSpentError, match="budget of 2 requests"):
                client.call(chat("c"))
            assert client.call(chat("a")).text == "A4"
        calls = CallSettings(budget_money=3.0)
        with client_at(tmp_path, url, calls=calls, **prices) as client:
            client.call(chat("c"))
            with pytest.raises(BudgetSpentError, match=r"budget of 3 is used up \(3 spent\)"):
                client.call(chat("d"))
            assert sum(cost.money for cost in client.shared.cache.costs()) == pytest.approx(3.0)
    assert len(stub.bodies) == 3


def test_concurrency_holds_over_several_clients(tmp_path):
    pair = threading.Barrier(2)

    def answer(body: dict[str, Any], before: int) -> str:
        if len(stub.bodies) <= 2:
            pair.wait(60)  # the first two must be there together
        return "A4"

    stub = Stub(answer)
    with (
        serve(stub) as url,
        client_at(tmp_path, url, concurrency=2) as one,
        client_at(tmp_path, url, name="two", concurrency=2) as two,
        ThreadPoolExecutor(16) as pool,
    ):
        list(pool.map(lambda i: (one, two)[i % 2].call(chat(f"Q{i // 2}?")), range(16)))
    assert (len(stub.bodies), stub.most) == (16, 2)


@pytest.mark.parametrize("fault", ["hang", (429, {"Retry-After": "86000"})])
def test_who_waits_is_told_when_the_run_ends_and_nothing_more_is_sent(tmp_path, fault):
    stub = Stub(always(fault))
    said: list[str] = []
    patient = CallSettings(longest_s=86_400.0)
    with serve(stub) as url, client_at(tmp_path, url, calls=patient, requests_per_minute=1e9) as client:

        def wait() -> None:
            try:
                client.call(chat())
            except StopRunError as error:
                said.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        while not stub.bodies:
            thread.join(0.01)
        client.shared.end(cancel=True)
        thread.join(30)
        wait()
        with pytest.raises(StopRunError):
            client.check()
    assert said == ["The run was ended while calls were under way; run it again to go on."] * 2
    assert len(stub.bodies) == 1


def test_replies_on_their_way_are_kept_when_the_run_ends_for_another_reason(tmp_path):
    asked, ended = threading.Event(), threading.Event()

    def answer(body: dict[str, Any], before: int) -> str:
        asked.set()
        ended.wait(60)
        return "A4"

    with serve(Stub(answer)) as url, client_at(tmp_path, url) as client, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.call, chat())
        assert asked.wait(60)
        client.shared.end(cancel=False)
        ended.set()
        assert reply.result().text == client.call(chat()).text == "A4"
        with pytest.raises(StopRunError):
            client.call(chat("Other?"))


def test_what_is_none_is_not_sent(tmp_path):
    stub = Stub(always("A4"))
    with serve(stub) as url, client_at(tmp_path, url) as client:
        client.sampling = Sampling(temperature=None, top_p=None, max_tokens=None, send_seed=False)
        client.call(chat())
    assert stub.bodies == [{"model": "m", "messages": [{"role": "user", "content": "Q?"}]}]


def test_the_rate_holds(tmp_path):
    stub = Stub(always("A4"))
    with serve(stub) as url, client_at(tmp_path, url, requests_per_minute=600.0) as client:
        start = time.monotonic()
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(lambda i: client.call(chat(f"Q{i}?")), range(5)))
        assert time.monotonic() - start >= 0.39  # four turns of 0.1 s after the first
    assert len(stub.bodies) == 5


RED = Image.new("RGB", (40, 30), "red")


def shown(image: Image.Image = RED, text: str = "Q?", most: int = 10_000) -> list[Message]:
    return [("user", (ChatImage(image, most), text))]


def key_of(
    messages: list[Message], name: str = "one", sample: int = 0, sampling: Sampling | None = None, **extra
) -> str:
    endpoint = EndpointSettings("http://x/v1", "m", extra_body=extra)
    return call_key(name, endpoint, messages, sampling or Sampling(), sample)


def test_pictures_go_as_png_scaled_down_in_shape():
    (message,) = wire(shown())
    assert message["content"][1] == {"type": "text", "text": "Q?"}
    url = message["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "PNG"
        assert image.getpixel((5, 5)) == (255, 0, 0)
    assert wire([("system", ("Hello",))]) == [{"role": "system", "content": "Hello"}]
    large = ChatImage(Image.new("RGB", (4000, 1000), "blue"), 10_000)
    with Image.open(io.BytesIO(base64.b64decode(large.url().partition(",")[2]))) as image:
        assert image.size == (200, 50)


def test_equal_content_is_one_call():
    palette = RED.convert("P", palette=Image.Palette.ADAPTIVE)
    assert key_of(shown()) == key_of(shown(RED.copy())) == key_of(shown(palette)) == key_of(shown(most=10**6))


@pytest.mark.parametrize(
    "other",
    [
        key_of(shown(text="Q!")), key_of(shown(Image.new("RGB", (40, 30), (255, 0, 1)))),
        key_of(shown(Image.new("RGB", (30, 40), "red"))), key_of(shown(most=500)), key_of(shown(), name="two"),
        key_of(shown(), sample=1), key_of(shown(), sampling=dataclasses.replace(Sampling(), temperature=0.8)),
        key_of(shown(), qzoom={"zoom": "never"}), key_of([("user", ("Q?",))]),
    ],
)  # fmt: skip
def test_anything_else_is_another(other):
    assert key_of(shown()) != other


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion("A4", (7, 3)), Reply("A4", False, "stub-1", 7, 3)),
        (completion("A4 bec", finish="length"), Reply("A4 bec", True, "stub-1", 100, 10)),
        (
            completion([{"type": "text", "text": "A"}, {"type": "text", "text": "4"}]),
            Reply("A4", False, "stub-1", 100, 10),
        ),
        (completion(None), Reply("", False, "stub-1", 100, 10)),
        (b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "7"}, "model": 3}', Reply("x")),
        (b'{"choices": [{"message": {"content": "a\\ud800b"}}]}', Reply("a?b")),
    ],
)
def test_completions_are_read(body, reply):
    assert read_reply(200, None, body) == reply


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}',
     b'{"choices": [{"message": {"content": 3}}]}', b"\xff\xfe", b"[" * 100_000],
)  # fmt: skip
def test_bodies_that_are_no_completion_may_pass(body):
    assert read_reply(200, None, body) == Failure("transient", "a reply that is no chat completion")


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((408, 409, 425, 429, 500, 502, 503, 504, 529), "transient"),
        ((400, 413, 422), "refused"),
        ((401, 403, 404, 402, 405, 301), "fatal"),
    ],
)
def test_statuses_are_told_apart(statuses, kind):
    for status in statuses:
        outcome = read_reply(status, None, b'{"error": {"message": "no"}}')
        assert isinstance(outcome, Failure)
        assert (status, outcome.kind) == (status, kind)


def test_complaints_are_one_short_line_and_unknown_models_fatal():
    body = b'{"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}'
    assert read_reply(400, None, body) == Failure(
        "fatal", "it does not know the model or the address (HTTP 400): The model `x` does not exist (model_not_found)"
    )
    assert read_reply(404, None, b"not here").kind == "fatal"
    refused = read_reply(413, None, b'{"error": "too\\nlong ' + b"x" * 1000 + b'"}')
    assert isinstance(refused, Failure)
    assert refused.reason.startswith("HTTP 413: too long xxx")
    assert len(refused.reason) < 220


@pytest.mark.parametrize(
    ("value", "wait"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), (None, None)]
)
def test_retry_after_in_seconds(value, wait):
    assert read_reply(429, value, b"") == Failure("transient", "HTTP 429", wait)
    found = read_reply(503, email.utils.formatdate(time.time() + 3000, usegmt=True), b"")  # a date
    assert 0 < found.wait_s <= 3000
