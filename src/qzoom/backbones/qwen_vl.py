"""What Qwen2.5-VL and Qwen3-VL share: picture preparation, M-RoPE positions, query and key projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from qzoom.backbones.base import Backbone, Rotary, VisualFeatures
from qzoom.config import TokenBudget

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["QwenVLBackbone"]


class QwenVLBackbone(Backbone):
    """Common to the Qwen vision-language families; subclasses name their rotary function and sink rule."""

    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]]]

    @property
    def decoder(self) -> nn.Module:
        """See `Backbone.decoder`."""
        return self.model.model.language_model

    @property
    def token_px(self) -> int:
        """Patch side times merge size."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    @property
    def image_token_id(self) -> int:
        """See `Backbone.image_token_id`."""
        return int(self.model.config.image_token_id)

    @property
    def image_delimiters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`<|vision_start|>` and `<|vision_end|>`."""
        config = self.model.config
        return (int(config.vision_start_token_id),), (int(config.vision_end_token_id),)

    @property
    def position_axes(self) -> int:
        """Time, height and width."""
        return 3

    @property
    def deepstack_levels(self) -> int:
        """Number of DeepStack mergers in the vision encoder; 0 without any."""
        return len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", None) or ())

    def default_budget(self) -> TokenBudget:
        """The processor's pixel limits divided by the pixels of a cell."""
        size = self.image_processor.size
        cell = self.token_px**2
        low = max(1, int(size["shortest_edge"]) // cell)
        return TokenBudget(low, max(low, int(size["longest_edge"]) // cell))

    def encode(self, images: Sequence[PIL.Image.Image], budgets: Sequence[TokenBudget | None]) -> list[VisualFeatures]:
        """See `Backbone.encode`."""
        if not images:
            return []
        pixels, grids = zip(*(self.pixels(i, b) for i, b in zip(images, budgets, strict=True)), strict=True)
        grid_thw = torch.cat(grids).to(self.device)
        out = self.model.model.get_image_features(
            torch.cat(pixels).to(self.device, self.dtype), image_grid_thw=grid_thw, return_dict=True
        )
        merge = int(self.model.config.vision_config.spatial_merge_size)
        shapes = [(rows // merge, columns // merge) for _, rows, columns in grid_thw.tolist()]
        levels = _by_picture(getattr(out, "deepstack_features", None) or [], shapes)
        features = []
        for i, grid in enumerate(shapes):
            size = (grid[1] * self.token_px, grid[0] * self.token_px)
            deep = tuple(level[i].to(self.dtype) for level in levels)
            features.append(VisualFeatures(out.pooler_output[i].to(self.dtype), deep, grid, size))
        return features

    def pixels(self, image: PIL.Image.Image, budget: TokenBudget | None) -> tuple[Tensor, Tensor]:
        """Normalised patches (patches, values) and their (1, 3) grid.

        The size is decided by `grid`, which agrees with the processor wherever the processor stays within the
        limits; the picture is brought to that size here only where the processor itself would overshoot.
        """
        from PIL import Image

        rows, columns = self.grid(image.size, budget)
        target = (columns * self.token_px, rows * self.token_px)
        if image.size != target:
            image = image.resize(target, Image.Resampling(int(self.image_processor.resample)))
        out = self.image_processor(images=[image], do_resize=False, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def positions(self, ids: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Stock M-RoPE positions, (3, length); every picture is a new image."""
        merge = int(self.model.config.vision_config.spatial_merge_size)
        if not grids:
            return torch.arange(len(ids), device=ids.device).expand(3, -1)
        grid_thw = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in grids], device=ids.device)
        kinds = (ids == self.image_token_id).long()[None]
        positions, _ = self.model.model.get_rope_index(ids[None], image_grid_thw=grid_thw, mm_token_type_ids=kinds)
        return positions[:, 0]

    def query(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """See `Backbone.query`."""
        attention: Any = layer.self_attn
        heads = self._heads(attention, attention.q_proj(layer.input_layernorm(hidden)), "q_norm")  # type: ignore[operator]
        return type(self).rotate(heads, heads, *rotary)[0]

    def key(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """See `Backbone.key`."""
        attention: Any = layer.self_attn
        heads = self._heads(attention, attention.k_proj(layer.input_layernorm(hidden)), "k_norm")  # type: ignore[operator]
        return type(self).rotate(heads, heads, *rotary)[1]

    def key_value(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """See `Backbone.key_value`."""
        attention: Any = layer.self_attn
        normed = layer.input_layernorm(hidden)  # type: ignore[operator]
        keys = self._heads(attention, attention.k_proj(normed), "k_norm")
        values = self._heads(attention, attention.v_proj(normed), "")
        return type(self).rotate(keys, keys, *rotary)[1], values

    @staticmethod
    def _heads(attention: Any, projected: Tensor, norm: str) -> Tensor:
        """(batch, length, heads * head_dim) to (batch, heads, length, head_dim), normed if the family does."""
        split = projected.view(*projected.shape[:-1], -1, attention.head_dim)
        if norm and hasattr(attention, norm):
            split = getattr(attention, norm)(split)
        return split.transpose(1, 2)


def _by_picture(levels: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> list[Sequence[Tensor]]:
    """DeepStack features of every level by picture; older releases of transformers give those of all in one tensor."""
    counts = [rows * columns for rows, columns in shapes]
    return [level.split(counts) if isinstance(level, Tensor) else level for level in levels]
