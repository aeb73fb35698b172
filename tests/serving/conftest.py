"""The embedded model and a server that several tests share."""

import copy
from collections.abc import Iterator

import pytest

from qzoom import QZoom
from tests.serving.running import Site, running


@pytest.fixture(scope="session")
def model() -> QZoom:
    return QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu")


@pytest.fixture(scope="session")
def endless() -> QZoom:
    """The same model with an end token that it never says: every answer has as many tokens as were allowed."""
    found = QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu")
    backbone = found.engine.backbone
    backbone.model.generation_config = copy.deepcopy(backbone.model.generation_config)
    backbone.model.generation_config.eos_token_id = [2**30]
    return found


@pytest.fixture(scope="package")
def site(model: QZoom) -> Iterator[Site]:
    """A server without keys and with the default limits."""
    with running(model) as found:
        yield found
