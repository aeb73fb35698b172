"""How a server ends: it drains, or stops at once."""

import http.client
import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from qzoom.errors import ConfigError
from qzoom.serving.server import bind
from tests.serving.running import chat, running
from tests.serving.test_load import Client, wait_until


def half_sent(site, body):
    """A request that the server has admitted, and whose second half is not there yet."""
    connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=120)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: len(body) // 2])
    wait_until(lambda: site.service.in_flight == 1)
    return connection


def test_draining_finishes_what_was_admitted_and_refuses_the_rest(model):
    with running(model, drain_s=100.0) as site, httpx.Client(base_url=site.url) as http_client:
        body = json.dumps(chat(qzoom={"zoom": "never"})).encode()
        connection = half_sent(site, body)
        site.stop()
        wait_until(lambda: site.service.draining)
        ready = http_client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert http_client.get("/health").status_code == 200
        refused = http_client.post("/v1/chat/completions", json=chat())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "stopping"
        assert "Retry-After" in refused.headers
        connection.send(body[len(body) // 2 :])
        reply = connection.getresponse()
        own = model.ask(*example(), max_new_tokens=8, zoom="never")
        assert reply.status == 200
        assert json.load(reply)["choices"][0]["message"]["content"] == own.text
        connection.close()
        site.thread.join(60)
        assert not site.thread.is_alive()


def example():
    from tests.serving.running import page

    return page(), "What is the total amount?"


def test_what_outlives_the_drain_is_told_so(endless):
    with running(endless, drain_s=0.2) as site:
        client = Client(site, max_tokens=1000)
        client.send()
        wait_until(lambda: site.service.scheduler.running == 1)
        site.stop()
        reply = client.connection.getresponse()
        assert reply.status == 503
        assert json.load(reply)["error"]["code"] == "stopping"
        client.leave()
        site.thread.join(60)
        assert not site.thread.is_alive()


def test_a_second_signal_stops_at_once(endless):
    with running(endless, drain_s=1000.0) as site:
        half_sent(site, b"{}" * 10)
        site.stop()
        wait_until(lambda: site.service.draining)
        site.stop()
        site.thread.join(60)
        assert not site.thread.is_alive()


def test_a_port_that_is_taken_is_said_to_be():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port} .*choose another"):
            bind("127.0.0.1", port)


def test_a_host_that_is_none_is_said_to_be():
    with pytest.raises(ConfigError, match="Cannot listen on no such host:0"):
        bind("no such host", 0)
