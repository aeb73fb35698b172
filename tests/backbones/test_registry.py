"""Model types: those that work are there, others and those that need a later transformers are one sentence."""

import pytest

from qzoom.backbones.registry import FAMILIES, backbone_class
from qzoom.errors import CheckpointError


def test_every_family_has_a_class_of_its_name():
    for family in FAMILIES:
        assert backbone_class(family).family == family.replace("llava_llama", "llava")


@pytest.mark.parametrize(("where", "start"), [("", "Models of type 'gemma4' are"), ("/m", "/m is a model of type")])
def test_an_unknown_family_is_one_sentence(where, start):
    with pytest.raises(CheckpointError, match=rf"^{start}.* not supported; .*qwen3_vl, .*port-a-backbone\.md.*\.$"):
        backbone_class("gemma4", where)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_family_that_transformers_is_too_old_for(family, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    said = f"/m is of type '{family}', which needs transformers 5.23 or newer, and 5.22.1 is installed; upgrade it."
    with pytest.raises(CheckpointError) as refused:
        backbone_class(family, "/m")
    assert str(refused.value) == said
    assert backbone_class("qwen3_vl").family == "qwen3_vl"
