"""The embedded model and a server that several tests share."""

import copy

import httpx
import pytest
from openai import OpenAI

from qzoom import QZoom
from tests.serving.running import running


@pytest.fixture(scope="session")
def model():
    return QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu")


@pytest.fixture(scope="session")
def endless():
    """The same model with an end token that it never says: every answer has as many tokens as were allowed."""
    found = QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu")
    backbone = found.engine.backbone
    backbone.model.generation_config = copy.deepcopy(backbone.model.generation_config)
    backbone.model.generation_config.eos_token_id = [2**30]
    backbone.tokenizer.eos_token = None
    return found


@pytest.fixture(scope="package")
def site(model):
    """A server without keys and with the default limits."""
    with running(model) as found:
        yield found


@pytest.fixture
def client(site):
    with OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def http(site):
    with httpx.Client(base_url=site.url, timeout=120) as found:
        yield found
