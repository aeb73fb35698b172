"""Qwen2.5-VL and Qwen3-VL: dynamic resolution, M-RoPE positions, DeepStack (3), and facts about their published models.

Qwen2.5-VL has windowed vision attention, biased projections and sectioned M-RoPE; Qwen3-VL has DeepStack features after
the first decoder layers, q and k norms and interleaved M-RoPE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from qzoom.backbones.base import Backbone, LabelHeads, ModelSizes, Rotary, VisionShape, VisualFeatures
from qzoom.config import TokenBudget
from qzoom.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import PIL.Image


_GROUP_PATCHES = {"cpu": 2304, "cuda": 65536}
"""Patches that the vision encoder takes at once: on a CPU a call for several large pictures is slower than one each."""


class QwenVLBackbone(Backbone):
    """Common to the Qwen vision-language families; subclasses name their sink rule and published models."""

    vision_maps: ClassVar[str] = r"(qkv|proj|linear_fc1|linear_fc2|gate_proj|up_proj|down_proj)(?<!patch_embed\.proj)"

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> None:
        super().__init__(model, tokenizer, image_processor, chat_template)
        self._check_processor()
        modeling = sys.modules[type(self.layers[0]).__module__]
        self._rotate: Callable[..., tuple[Tensor, Tensor]] = modeling.apply_rotary_pos_emb
        """Sectioned or interleaved M-RoPE, from the family's own modelling module."""
        use_linear_patches(self.vision_tower)

    def _check_processor(self) -> None:
        """Refuse an image processor that cuts pictures into other patches than the model reads (CheckpointError)."""
        vision = self.model.config.vision_config
        for own, name in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):
            found, needed = getattr(self.image_processor, own, None), getattr(vision, name)
            if found is not None and found != needed:
                raise CheckpointError(
                    f"The image processor (preprocessor_config.json) has {own}={found!r}, but the model's "
                    f"vision_config has {name}={needed!r}; copy preprocessor_config.json from the base model."
                )

    @property
    def decoder(self) -> nn.Module:
        """See `Backbone.decoder`."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """Vision encoder and mergers."""
        return self.model.model.visual

    @cached_property
    def token_px(self) -> int:
        """Patch side times merge size."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    @cached_property
    def image_token_id(self) -> int:
        """See `Backbone.image_token_id`."""
        return int(self.model.config.image_token_id)

    @cached_property
    def image_delimiters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`<|vision_start|>` and `<|vision_end|>`."""
        config = self.model.config
        return (int(config.vision_start_token_id),), (int(config.vision_end_token_id),)

    @property
    def position_axes(self) -> int:
        """Time, height and width."""
        return 3

    @cached_property
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
        merge = int(self.model.config.vision_config.spatial_merge_size)
        most = _GROUP_PATCHES["cuda" if self.device.type == "cuda" else "cpu"]
        sizes = [rows * columns * merge**2 for rows, columns in map(self.grid, (i.size for i in images), budgets)]
        features: list[VisualFeatures] = []
        start = 0
        while start < len(images):
            stop = start + 1
            while stop < len(images) and sum(sizes[start : stop + 1]) <= most:
                stop += 1
            features += self._encode_group(images[start:stop], budgets[start:stop])
            start = stop
        return features

    def _encode_group(
        self, images: Sequence[PIL.Image.Image], budgets: Sequence[TokenBudget | None]
    ) -> list[VisualFeatures]:
        """One call of the vision encoder."""
        pixels, grids = zip(*(self.pixels(i, b) for i, b in zip(images, budgets, strict=True)), strict=True)
        grid_thw = torch.cat(grids).to(self.device)
        with self.computing():
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
        resized = self.resize(image, budget)
        if self._levels is None:
            out = self.image_processor(images=[resized], do_resize=False, return_tensors="pt")
            return out["pixel_values"], out["image_grid_thw"]
        side = int(self.image_processor.patch_size)
        grid = torch.tensor([[1, resized.height // side, resized.width // side]])
        return torch.from_numpy(self._look_up(resized, self._levels)), grid

    @cached_property
    def _levels(self) -> np.ndarray | None:
        """(3, 256): what the image processor makes of each value of each channel; None where it does more than that.

        The processor works in 64-bit floats on whole pictures, and takes as long as a small model's encoder.
        """
        side = self.token_px
        ramp = Image.fromarray(np.resize(np.arange(256, dtype=np.uint8), (side, side, 1)).repeat(3, axis=2))
        noise = np.random.default_rng(0).integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)
        wanted = [
            self.image_processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"]
            for picture in (ramp, Image.fromarray(noise))
        ]
        places = self._look_up(ramp, np.tile(np.arange(256, dtype=np.float32), (3, 1)))
        if places.shape != wanted[0].shape:
            return None
        levels = np.zeros((3, 256), dtype=np.float32)
        for channel in range(3):
            values, own = (x.reshape(len(x), 3, -1)[:, channel] for x in (places, wanted[0]))
            levels[channel][values.astype(np.uint8)] = own
        return levels if np.array_equal(self._look_up(Image.fromarray(noise), levels), wanted[1]) else None

    def _look_up(self, image: PIL.Image.Image, levels: np.ndarray) -> np.ndarray:
        """Patches (patches, values) of a picture whose sides are whole tokens, in the order of the vision encoder."""
        merge, side = int(self.image_processor.merge_size), int(self.image_processor.patch_size)
        frames = int(self.image_processor.temporal_patch_size)
        pixels = np.asarray(image)
        rows, columns = image.height // (merge * side), image.width // (merge * side)
        blocks = pixels.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        values = blocks.reshape(-1, 3, side * side)
        out = np.empty((len(values), 3, frames, side * side), dtype=np.float32)
        for channel in range(3):
            out[:, channel] = levels[channel].take(values[:, channel])[:, None]
        return out.reshape(len(values), -1)

    def vision_shape(self) -> VisionShape:
        """See `Backbone.vision_shape`."""
        vision = self.model.config.vision_config
        full = getattr(vision, "fullatt_block_indexes", None)
        window_px = getattr(vision, "window_size", 0) if full else 0
        return VisionShape(
            vision_layers=vision.depth,
            vision_hidden=vision.hidden_size,
            vision_feed=vision.intermediate_size,
            vision_gated=hasattr(self.vision_tower.blocks[0].mlp, "gate_proj"),  # type: ignore[index, union-attr]
            vision_full_layers=len(full) if full else vision.depth,
            window_patches=(window_px // vision.patch_size) ** 2,
            patch_values=getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size,
            mergers=1 + self.deepstack_levels,
        )

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
        return self._rotate(heads, heads, *rotary)[0]

    def key(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """See `Backbone.key`."""
        attention: Any = layer.self_attn
        heads = self._heads(attention, attention.k_proj(layer.input_layernorm(hidden)), "k_norm")  # type: ignore[operator]
        return self._rotate(heads, heads, *rotary)[1]

    def key_value(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """See `Backbone.key_value`."""
        attention: Any = layer.self_attn
        normed = layer.input_layernorm(hidden)  # type: ignore[operator]
        keys = self._heads(attention, attention.k_proj(normed), "k_norm")
        values = self._heads(attention, attention.v_proj(normed), "")
        return self._rotate(keys, keys, *rotary)[1], values

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


_3B = ModelSizes(2048, 11008, 36, 16, 2, 128, 151936, True, 668_684_288, qkv_bias=True)
_7B = ModelSizes(3584, 18944, 28, 28, 4, 128, 152064, False, 676_550_144, qkv_bias=True)
_4B = ModelSizes(2560, 9728, 36, 32, 8, 128, 151936, True, 415_347_712, qk_norm=True)
_8B = ModelSizes(4096, 12288, 36, 32, 8, 128, 151936, False, 576_388_336, qk_norm=True)


class Qwen2_5VLBackbone(QwenVLBackbone):
    """`Qwen2_5_VLForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "qwen2_5_vl"
    default_sink: ClassVar[str] = "corner"
    published: ClassVar[Mapping[str, ModelSizes]] = {
        "Qwen/Qwen2.5-VL-3B-Instruct": _3B,
        "Qwen/Qwen2.5-VL-7B-Instruct": _7B,
        "inclusionAI/ZwZ-7B": _7B,
    }
    label_heads: ClassVar[LabelHeads] = {
        (2048, 36): {"text": ("20:1,4 22:14", ""), "natural": ("21:9,11 22:0,7", "8:1,13")},
        (3584, 28): {"text": ("22:1,4 23:6,11", ""), "natural": ("16:1,7,17 19:17,20", "9:4,22")},
    }


class Qwen3VLBackbone(QwenVLBackbone):
    """`Qwen3VLForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "qwen3_vl"
    default_sink: ClassVar[str] = "first_token"
    published: ClassVar[Mapping[str, ModelSizes]] = {
        "Qwen/Qwen3-VL-4B-Instruct": _4B,
        "Qwen/Qwen3-VL-8B-Instruct": _8B,
        "inclusionAI/ZwZ-4B": _4B,
        "inclusionAI/ZwZ-8B": _8B,
    }
    label_heads: ClassVar[LabelHeads] = {
        (2560, 36): {"text": ("19:24,27 24:21,23", "24:6,10"), "natural": ("20:15,21,23 21:8,10,11", "20:1,24")},
        (4096, 36): {"text": ("19:24,26,27 24:21,22,23", "24:1,2"), "natural": ("20:15,21,23 21:8,10,11", "21:7")},
    }


class Qwen3VLMoeBackbone(Qwen3VLBackbone):
    """`Qwen3VLMoeForConditionalGeneration`, unforked; experts are fused, so that LoRA goes on attention only."""

    family: ClassVar[str] = "qwen3_vl_moe"
    published: ClassVar[Mapping[str, ModelSizes]] = {}
    label_heads: ClassVar[LabelHeads] = {}

    def vision_shape(self) -> VisionShape:
        """See `Backbone.vision_shape`; the decoder's FLOPs are not stated."""
        raise ConfigError(f"FLOPs cannot be counted for models of type {self.family!r}: experts are not stated.")


def use_linear_patches(tower: nn.Module) -> None:
    """Compute a vision encoder's patch embedding as a linear map. Weights and their names stay.

    The convolution's kernel covers each patch exactly, which is a matrix product. As such it takes a third of the time
    on CPUs; some versions of cuDNN have no fast kernel for the convolution. transformers offers the same exchange as
    `fusion_config`, but for all models of a class in the process. Convolutions of any other shape stay.
    """
    conv = getattr(getattr(tower, "patch_embed", None), "proj", None)
    if not isinstance(conv, nn.Conv3d) or conv.stride != conv.kernel_size:
        return
    if any(conv.padding) or any(step != 1 for step in conv.dilation) or conv.groups != 1:
        return
    conv.forward = partial(_linear_patches, conv)  # type: ignore[method-assign]


def _linear_patches(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """(n, channels, frames, rows, columns), each as large as the kernel -> (n, hidden, 1, 1, 1)."""
    out = functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    return out[:, :, None, None, None]
