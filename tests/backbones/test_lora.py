import pytest
import torch

from qzoom.backbones.lora import LoraWeights
from qzoom.errors import CheckpointError

SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
MAP = "layers.4.self_attn.q_proj"


def pair(prefix: str) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{prefix}{MAP}"
    return {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_the_decoders_maps_are_found(prefix):
    assert LoraWeights("0", SETTINGS, pair(prefix)).targets == [MAP]


@pytest.mark.parametrize(
    "prefix", ["model.visual.", "visual.", "model.vision_tower.", "region.", "model.x.language_model."]
)
def test_matrices_of_other_parts_are_refused(prefix):
    with pytest.raises(CheckpointError, match="not pairs of matrices of the decoder's linear maps"):
        LoraWeights("0", SETTINGS, pair(prefix))
    with pytest.raises(CheckpointError, match="not pairs of matrices of the decoder's linear maps"):
        LoraWeights("0", SETTINGS, pair("model.") | pair(prefix))


def test_two_matrices_for_one_map_are_refused():
    with pytest.raises(CheckpointError, match="two matrices for one map"):
        LoraWeights("0", SETTINGS, pair("model.") | pair("model.language_model."))
