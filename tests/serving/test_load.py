"""Clients that leave, full queues, deadlines: what is held is given back."""

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from qzoom.serving.limits import ServerLimits
from qzoom.serving.scheduler import SchedulerLimits
from tests.serving.running import chat, running

LONG = {"max_tokens": 1000, "qzoom": {"zoom": "never"}}
WAIT_S = 120


@pytest.fixture(scope="module")
def narrow(endless):
    """One slot, one place in the queue, and answers that take as long as they may."""
    with running(endless, scheduler=SchedulerLimits(slots=1, queue=1)) as found:
        yield found


def wait_until(condition):
    """Until it holds; a state of another thread has no event to wait for."""
    done = threading.Event()
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        done.wait(0.01)


def idle(site):
    return site.service.scheduler.running == 0 and site.service.scheduler.waiting == 0 and site.service.in_flight == 0


class Client:
    """One connection that can be dropped at any moment."""

    def __init__(self, site, **more):
        self.connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=WAIT_S)
        self.body = json.dumps(chat(**(LONG | more))).encode()

    def send(self, part=1.0):
        self.connection.putrequest("POST", "/v1/chat/completions")
        self.connection.putheader("Content-Type", "application/json")
        self.connection.putheader("Content-Length", str(len(self.body)))
        self.connection.endheaders(self.body[: int(part * len(self.body))])

    def leave(self):
        self.connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(narrow, stream):
    client = Client(narrow, stream=stream)
    client.send()
    if stream:
        reply = client.connection.getresponse()
        assert reply.read1(4096).startswith(b"data: ")
        reply.close()
    else:
        wait_until(lambda: narrow.service.scheduler.running == 1)
    client.leave()
    wait_until(lambda: idle(narrow))
    generated = narrow.service.metrics.text().decode()
    assert "qzoom:generation_tokens_total 0.0" in generated, "the answer went on to its end"


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(narrow):
    client = Client(narrow)
    client.send(part=0.5)
    wait_until(lambda: narrow.service.in_flight == 1)
    client.leave()
    wait_until(lambda: idle(narrow))


def test_a_client_that_leaves_the_queue_makes_room(narrow):
    first, second = Client(narrow), Client(narrow)
    first.send()
    wait_until(lambda: narrow.service.scheduler.running == 1)
    second.send()
    wait_until(lambda: narrow.service.scheduler.waiting == 1)
    second.leave()
    wait_until(lambda: narrow.service.scheduler.waiting == 0)
    assert narrow.service.scheduler.running == 1
    first.leave()
    wait_until(lambda: idle(narrow))


def test_a_full_queue_is_429_with_retry_after(narrow):
    clients = [Client(narrow), Client(narrow)]
    clients[0].send()
    wait_until(lambda: narrow.service.scheduler.running == 1)
    clients[1].send()
    wait_until(lambda: narrow.service.scheduler.waiting == 1)
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
