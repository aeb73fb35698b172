import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from qzoom.errors import ConfigError
from qzoom.serving.server import bind
from qzoom.serving.settings import SchedulerLimits, ServerLimits
from tests.serving.running import chat, idle, page, running, wait_until

LONG = {"max_tokens": 1000, "qzoom": {"zoom": "never"}}
WAIT_S = 120


@pytest.fixture(scope="module")
def narrow(endless):
    """One slot, one place in the queue, and answers that take as long as they may."""
    with running(endless, scheduler=SchedulerLimits(slots=1, queue=1)) as found:
        yield found


class Client:
    """One connection that can be dropped at any moment."""

    def __init__(self, site, **more):
        self.connection = http.client.HTTPConnection(site.url.removeprefix("http://"), timeout=WAIT_S)
        self.body = json.dumps(chat(**(LONG | more))).encode()

    def send(self, part=1.0):
        self.connection.putrequest("POST", "/v1/chat/completions")
        self.connection.putheader("Content-Type", "application/json")
        self.connection.putheader("Content-Length", str(len(self.body)))
        self.connection.endheaders(self.body[: int(part * len(self.body))])

    def leave(self):
        self.connection.close()


def half_sent(site, **more):
    """A client whose request is in flight while the second half of its body is not there yet."""
    client = Client(site, **more)
    client.send(part=0.5)
    wait_until(lambda: site.service.in_flight == 1)
    return client


def test_draining_finishes_what_was_admitted_and_refuses_the_rest(model):
    with running(model, drain_s=100.0) as site, httpx.Client(base_url=site.url) as http_client:
        client = half_sent(site, max_tokens=8)
        site.stop()
        wait_until(lambda: site.service.draining)
        ready = http_client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert http_client.get("/health").status_code == 200
        refused = http_client.post("/v1/chat/completions", json=chat())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "stopping"
        assert "Retry-After" in refused.headers
        client.connection.send(client.body[len(client.body) // 2 :])
        reply = client.connection.getresponse()
        own = model.ask(page(), "What is the total amount?", max_new_tokens=8, zoom="never")
        assert reply.status == 200
        assert json.load(reply)["choices"][0]["message"]["content"] == own.text
        client.leave()
        site.thread.join(60)
        assert not site.thread.is_alive()


def test_what_outlives_the_drain_is_told_so(endless):
    with running(endless, drain_s=0.2) as site:
        client = Client(site, max_tokens=1000)
        client.send()
        wait_until(lambda: site.service.engine.running == 1)
        site.stop()
        reply = client.connection.getresponse()
        assert reply.status == 503
        assert json.load(reply)["error"]["code"] == "stopping"
        client.leave()
        site.thread.join(60)
        assert not site.thread.is_alive()


def test_a_second_signal_stops_at_once(endless):
    with running(endless, drain_s=1000.0) as site:
        half_sent(site)
        site.stop()
        wait_until(lambda: site.service.draining)
        site.stop()
        site.thread.join(60)
        assert not site.thread.is_alive()


def test_an_address_that_cannot_be_had_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port} .*choose another"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="Cannot listen on no such host:0"):
        bind("no such host", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(narrow, stream):
    client = Client(narrow, stream=stream)
    client.send()
    if stream:
        reply = client.connection.getresponse()
        assert reply.read1(4096).startswith(b"data: ")
        reply.close()
    else:
        wait_until(lambda: narrow.service.engine.running == 1)
    client.leave()
    wait_until(lambda: idle(narrow))
    generated = narrow.service.metrics.text().decode()
    assert "qzoom:generation_tokens_total 0.0" in generated, "the answer went on to its end"


def test_clients_that_leave_their_body_or_the_queue_make_room(narrow):
    half_sent(narrow).leave()
    wait_until(lambda: idle(narrow))
    first, second = Client(narrow), Client(narrow)
    first.send()
    wait_until(lambda: narrow.service.engine.running == 1)
    second.send()
    wait_until(lambda: narrow.service.engine.waiting == 1)
    second.leave()
    wait_until(lambda: narrow.service.engine.waiting == 0)
    assert narrow.service.engine.running == 1
    first.leave()
    wait_until(lambda: idle(narrow))


def test_a_full_queue_is_429_with_retry_after(narrow):
    clients = [Client(narrow), Client(narrow)]
    clients[0].send()
    wait_until(lambda: narrow.service.engine.running == 1)
    clients[1].send()
    wait_until(lambda: narrow.service.engine.waiting == 1)
    reply = httpx.post(f"{narrow.url}/v1/chat/completions", json=chat(), timeout=WAIT_S)
    assert reply.status_code == 429
    assert int(reply.headers["Retry-After"]) >= 1
    assert reply.json()["error"]["code"] == "queue_full"
    assert reply.json()["error"]["type"] == "rate_limit_error"
    for client in clients:
        client.leave()
    wait_until(lambda: idle(narrow))


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_504_or_ends_the_stream_with_its_error(endless, stream):
    with running(endless, deadline_s=3.0, limits=ServerLimits(max_new_tokens=4000)) as site:
        body = chat(**(LONG | {"max_tokens": 3500, "stream": stream}))
        reply = httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=WAIT_S)
        if stream and reply.status_code == 200:
            records = [part for part in reply.text.split("\n\n") if part]
            assert records[-1] == "data: [DONE]"
            error = json.loads(records[-2][6:])["error"]
        else:
            assert reply.status_code == 504
            error = reply.json()["error"]
        assert error["code"] == "deadline_exceeded"
        wait_until(lambda: idle(site))


def test_many_clients_at_once_get_the_answers_that_one_gets(site, model):
    asks = [chat(max_tokens=n, qzoom={"zoom": zoom}) for n in (2, 6) for zoom in ("never", "always", "auto")]
    url = f"{site.url}/v1/chat/completions"

    def ask(body):
        reply = httpx.post(url, json=body, timeout=WAIT_S)
        return reply.raise_for_status().json()["choices"][0]["message"]["content"]

    alone = [ask(body) for body in asks]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, asks * 2)) == alone * 2
