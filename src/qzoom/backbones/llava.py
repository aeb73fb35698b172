"""LLaVA-1.5: a CLIP tower that sees squares of 336 px, a projector, a Llama decoder with plain positions.

The zooming arithmetic is that of SD-RPN's release (docs/method.md 11): a norm of its own in the region branch, a map
without rotation, boxes by components, crops stretched to the square. The authors' files have names and settings of
their own, which `released_layout` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qzoom.backbones.base import Backbone, LabelHeads, ModelSizes, ReleasedLayout, Rotary, VisionShape, VisualFeatures
from qzoom.config import BoxRule, TokenBudget
from qzoom.errors import BudgetError, CheckpointError

if TYPE_CHECKING:
    import PIL.Image

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_FORMAT = (
    "{%- set system = namespace(text=" + repr(SYSTEM) + ") -%}"
    "{%- for message in messages if message.role == 'system' -%}"
    "{%- if message.content is string -%}{%- set system.text = message.content -%}{%- else -%}"
    "{%- set system.text = message.content | map(attribute='text') | join('') -%}{%- endif -%}{%- endfor -%}"
    "{{- system.text + ' ' -}}"
    "{%- for message in messages if message.role != 'system' -%}"
    "{{- 'USER: ' if message.role == 'user' else 'ASSISTANT: ' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{{- '<image>\n' if part.type == 'image' else part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- ' ' if message.role == 'user' else '</s>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
"""Vicuna's prompt; the text is cut at the pictures, and every piece is tokenised alone."""
_7B = ModelSizes(4096, 11008, 32, 32, 32, 128, 32064, False, 324_487_168)
_13B = ModelSizes(5120, 13824, 40, 40, 40, 128, 32064, False, 334_974_976)


TOWER_SETTING = "mm_vision_tower"
_NEEDED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
}
_TO_STOCK = [
    (r".*(position_ids|inv_freq)", None),
    (r"model\.mm_projector\.0\.(.+)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(.+)", r"model.multi_modal_projector.linear_2.\1"),
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"vision_model\.(.+)", r"model.vision_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
    (r"(?:language_model\.)?lm_head\.weight", r"lm_head.weight"),
    (
        r"(?:model\.language_model|language_model\.model|model)\.((?:embed_tokens|layers|norm)\..+)",
        r"model.language_model.\1",
    ),
]  # fmt: skip
"""Names of the authors, of their vision tower's folder, and of transformers 4 and 5; the first that fits counts."""
_TO_RELEASED = [
    (r"model\.multi_modal_projector\.linear_1\.(.+)", r"model.mm_projector.0.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(.+)", r"model.mm_projector.2.\1"),
    (r"model\.vision_tower\.(.+)", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"model\.language_model\.(.+)", r"model.\1"),
    (r"(.+)", r"\1"),
]
_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""CLIP ViT-L/14 at 336 px."""


_MOST_SIDE_PX = 8192
"""Longer pictures are shrunk before they are padded: the square of a strip within the limits would take gigabytes."""


def _renamed(name: str, rules: Sequence[tuple[str, str | None]]) -> str | None:
    for pattern, new in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return None if new is None else match.expand(new)
    return None


def _stock_config(settings: Mapping[str, Any], tower: Mapping[str, Any] | None) -> Any:
    """transformers' config from the authors' flat one and their vision tower's, which is CLIP's own if it has none."""
    vision: dict[str, Any] = dict(_TOWER) if tower is None else dict(tower.get("vision_config") or tower)
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    skipped = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype")
    text = {key: value for key, value in settings.items() if key in known and key not in skipped}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in vision.items() if k not in skipped}),
        text_config=LlamaConfig(**text),
        image_token_index=int(settings["vocab_size"]),
        vision_feature_layer=int(settings.get("mm_vision_select_layer", -2)),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
    )


def _released_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' flat config.json from transformers' config.json."""
    config: Any = LlavaConfig(
        **{k: v for k, v in settings.items() if k not in ("architectures", "transformers_version")}
    )
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    names = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "head_dim", "mlp_bias")
    out = {key: value for key, value in text.items() if key not in names}
    return out | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": rope.get("rope_theta", 10000.0),
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config.vision_config.hidden_size,
        TOWER_SETTING: "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": config.vision_feature_layer,
        "use_mm_proj": True,
        "mm_use_im_patch_token": False,
        **_NEEDED,
    }


RELEASED = ReleasedLayout(
    config=_stock_config,
    settings=_released_settings,
    stock_name=lambda name: _renamed(name, _TO_STOCK),
    released_name=lambda name: str(_renamed(name, _TO_RELEASED)),
    tower="model.vision_tower.",
    tower_setting=TOWER_SETTING,
    copies={"twig_head.weight": "lm_head.weight"},
    table=("model.language_model.embed_tokens.weight", "lm_head.weight"),
)


class LlavaBackbone(Backbone):
    """`LlavaForConditionalGeneration`, unforked; every picture is padded to a square and takes the same grid."""

    family: ClassVar[str] = "llava"
    default_sink: ClassVar[str] = "none"
    square_padding: ClassVar[tuple[int, int, int] | None] = (122, 116, 104)  # the mean that CLIP subtracts
    fixed_grid: ClassVar[bool] = True
    chat_format: ClassVar[str] = CHAT_FORMAT
    placeholder: ClassVar[str] = IMAGE
    vision_maps: ClassVar[str] = r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    published: ClassVar[Mapping[str, ModelSizes]] = {"llava-hf/llava-1.5-7b-hf": _7B, "llava-hf/llava-1.5-13b-hf": _13B}
    label_heads: ClassVar[LabelHeads] = {
        (4096, 32): dict.fromkeys(("text", "natural"), ("14:13,24,26", "2:" + ",".join(map(str, range(32))))),
        (5120, 40): dict.fromkeys(("text", "natural"), ("16:2,21,30 15:2 13:21,23,26", "16:17,22")),
    }

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> None:
        if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([IMAGE], special_tokens=True)
        super().__init__(model, tokenizer, image_processor, chat_template or CHAT_FORMAT)

    @classmethod
    def zoom_defaults(cls) -> dict[str, Any]:
        """The evaluation's way: one crop, or of several regions the tokens that lie on them."""
        box = BoxRule(
            components="groups", too_many="mask", min_cells=2, max_cells=225, widen_cells=3, min_side_px=1
        )  # fmt: skip
        return {"sink": "none", "region_threshold": 0.15, "map_rotary": False, "branch_norm": True, "box": box}

    released: ClassVar[ReleasedLayout | None] = RELEASED

    @classmethod
    def released_layout(cls, settings: Mapping[str, Any]) -> ReleasedLayout | None:
        """The authors' layout, told by the setting that names the vision tower."""
        if TOWER_SETTING not in settings:
            return None
        for name, needed in _NEEDED.items():
            if settings.get(name, needed) != needed:
                raise CheckpointError(
                    f"This LLaVA has {name}={settings[name]!r}; only LLaVA-1.5 ({needed!r}) is supported."
                )
        return RELEASED

    @classmethod
    def image_processor_for(cls, settings: Mapping[str, Any]) -> Any:
        """CLIP's, for squares of 336 px."""
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        side = 336
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The Llama inside."""
        return self.model.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """The CLIP encoder; the projector is a module of its own and trains with no stage."""
        return self.model.model.vision_tower

    @property
    def token_px(self) -> int:
        """One visual token is one CLIP patch."""
        return int(self.model.config.vision_config.patch_size)

    @property
    def side_cells(self) -> int:
        """24 for 336 px and patches of 14 px."""
        return int(self.model.config.vision_config.image_size) // self.token_px

    @property
    def image_token_id(self) -> int:
        """`<image>`, which released models have no row for in their token table."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE))

    @property
    def image_delimiters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Nothing opens or closes a block of visual tokens."""
        return (), ()

    @property
    def position_axes(self) -> int:
        """One axis, so aligned positions do not apply: regions get stock ones."""
        return 1

    @property
    def deepstack_levels(self) -> int:
        """Visual features enter at the bottom only."""
        return 0

    # -- pictures ----------------------------------------------------------------------------------------------------

    def default_budget(self) -> TokenBudget:
        """The grid is fixed, so the limits are equal."""
        return TokenBudget(self.side_cells**2, self.side_cells**2)

    def grid(self, size_px: tuple[int, int], budget: TokenBudget | None) -> tuple[int, int]:
        """Always the same (BudgetError: limits that exclude it)."""
        count = self.side_cells**2
        if budget is not None and not budget.min_tokens <= count <= budget.max_tokens:
            raise BudgetError(
                f"This model reads every picture and region as {count} visual tokens, but the limits are "
                f"{budget.min_tokens} to {budget.max_tokens}; choose limits that allow {count}."
            )
        return self.side_cells, self.side_cells

    def pixels(self, image: PIL.Image.Image, budget: TokenBudget | None) -> tuple[Tensor, Tensor]:
        """A picture in the middle of its square, resized and normalised, (1, 3, side, side), and its patch grid."""
        self.grid(image.size, budget)
        image = self._square(image)
        out = self.image_processor(images=[image], return_tensors="pt", **self._sizes)
        return out["pixel_values"], torch.tensor([[1, self.side_cells, self.side_cells]])

    def resize(self, image: PIL.Image.Image, budget: TokenBudget | None) -> PIL.Image.Image:
        """In the middle of its square, in the size that `encode` gives it."""
        return super().resize(self._square(image), budget)

    def _square(self, image: PIL.Image.Image) -> PIL.Image.Image:
        from PIL import Image

        if max(image.size) > _MOST_SIDE_PX:
            image = image.copy()
            image.thumbnail((_MOST_SIDE_PX, _MOST_SIDE_PX))
        side = max(image.size)
        if image.size == (side, side):
            return image
        square = Image.new("RGB", (side, side), self.square_padding)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    @property
    def _sizes(self) -> dict[str, Any]:
        side = self.side_cells * self.token_px
        return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}

    def crop(self, image: PIL.Image.Image, box: tuple[int, int, int, int]) -> PIL.Image.Image:
        """A region stretched to the square, whatever its shape."""
        from PIL import Image

        side = self.side_cells * self.token_px
        return image.crop(box).resize((side, side), Image.Resampling.BILINEAR)

    def vision_shape(self) -> VisionShape:
        """See `Backbone.vision_shape`."""
        vision = self.model.config.vision_config
        return VisionShape(
            vision_layers=vision.num_hidden_layers,
            vision_hidden=vision.hidden_size,
            vision_feed=vision.intermediate_size,
            vision_gated=False,
            vision_full_layers=vision.num_hidden_layers,
            window_patches=0,
            patch_values=3 * vision.patch_size**2,
            merge=1,
            mergers=1,
        )

    def encode(self, images: Sequence[PIL.Image.Image], budgets: Sequence[TokenBudget | None]) -> list[VisualFeatures]:
        """See `Backbone.encode`."""
        if not images:
            return []
        values = [self.pixels(image, budget)[0] for image, budget in zip(images, budgets, strict=True)]
        with self.computing():
            out = self.model.model.get_image_features(
                torch.cat(values).to(self.device, self.dtype),
                vision_feature_layer=self.model.config.vision_feature_layer,
                vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
                return_dict=True,
            )
        grid, side = (self.side_cells, self.side_cells), self.side_cells * self.token_px
        return [VisualFeatures(tokens.to(self.dtype), (), grid, (side, side)) for tokens in out.pooler_output]

    # -- tokens ------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """See `Backbone.embed`; placeholders, whose embeddings are replaced, stand for token 0."""
        return self.embedding(ids.masked_fill(ids == self.image_token_id, 0))

    def positions(self, ids: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """0, 1, 2, ..., (1, length)."""
        return torch.arange(len(ids), device=ids.device)[None]

    # -- decoder -----------------------------------------------------------------------------------------------------

    def query(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """See `Backbone.query`."""
        heads = self._heads(layer, "q_proj", hidden)
        return apply_rotary_pos_emb(heads, heads, *rotary)[0]

    def key(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """See `Backbone.key`."""
        heads = self._heads(layer, "k_proj", hidden)
        return apply_rotary_pos_emb(heads, heads, *rotary)[1]

    def key_value(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """See `Backbone.key_value`."""
        return self.key(layer, hidden, rotary), self._heads(layer, "v_proj", hidden)

    @staticmethod
    def _heads(layer: Any, name: str, hidden: Tensor) -> Tensor:
        projected = getattr(layer.self_attn, name)(layer.input_layernorm(hidden))
        return projected.view(*projected.shape[:-1], -1, layer.self_attn.head_dim).transpose(1, 2)
