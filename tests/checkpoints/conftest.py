"""Merged checkpoints of both families, written once; tests that change files work on copies."""

import huggingface_hub.constants
import pytest

from tests import tiny_models
from tests.checkpoints import folders


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    return {family: folders.write_merged(folders.engine(family), root / family) for family in tiny_models.FAMILIES}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    return {family: folders.write_plain(folders.engine(family), root / family) for family in tiny_models.FAMILIES}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty local cache of the hub, offline."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root
