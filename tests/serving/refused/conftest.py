"""A server that is asked badly, and that answers the next good request as before."""

import json

import pytest

from qzoom.serving.settings import ServerLimits
from tests.serving.refusals import GOOD, send
from tests.serving.running import running


@pytest.fixture(scope="module")
def server(model):
    with running(model, limits=ServerLimits(body_bytes=4 * 2**20, body_timeout_s=20.0)) as site:
        yield site


@pytest.fixture(scope="module")
def good_text(server):
    status, raw = send(server, GOOD)
    assert status == 200
    return json.loads(raw)["choices"][0]["message"]["content"]


@pytest.fixture(autouse=True)
def _next_good_request_is_answered(server, good_text):
    yield
    status, raw = send(server, GOOD)
    assert status == 200
    assert json.loads(raw)["choices"][0]["message"]["content"] == good_text
