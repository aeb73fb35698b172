"""GLM-4.1V and GLM-4.6V-Flash: full attention, M-RoPE on half of each head, norms after attention and MLP.

Dynamic resolution and positions are those of the Qwen-VL families; the blocks of visual tokens have delimiters of their
own, and the image processor counts a picture's pixels once for each of its two frames.
"""

from __future__ import annotations

from typing import ClassVar

from qzoom.backbones.base import VisionShape
from qzoom.backbones.qwen_vl import QwenVLBackbone
from qzoom.config import TokenBudget
from qzoom.errors import ConfigError


class Glm4vBackbone(QwenVLBackbone):
    """`Glm4vForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "glm4v"

    @property
    def image_delimiters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`<|begin_of_image|>` and `<|end_of_image|>`."""
        config = self.model.config
        return (int(config.image_start_token_id),), (int(config.image_end_token_id),)

    def default_budget(self) -> TokenBudget:
        """The processor's pixel limits divided by the pixels of a cell in all frames."""
        size = self.image_processor.size
        cell = self.token_px**2 * int(self.image_processor.temporal_patch_size)
        low = max(1, int(size["shortest_edge"]) // cell)
        return TokenBudget(low, max(low, int(size["longest_edge"]) // cell))

    def vision_shape(self) -> VisionShape:
        """See `Backbone.vision_shape`; the encoder's downsampling is not stated."""
        raise ConfigError(f"FLOPs cannot be counted for models of type {self.family!r}: another kind of encoder.")


class Glm46vBackbone(Glm4vBackbone):
    """`Glm46VForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "glm46v"
