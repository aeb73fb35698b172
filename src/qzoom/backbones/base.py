"""The protocol a model family implements: pictures to features, tokens to hidden states, layers one by one.

A backbone knows tensors and layers of one transformers model, unforked. It knows nothing of thresholds, boxes or HTTP
and keeps no state of a request, so many threads may use one. `docs/port-a-backbone.md` walks through a new family.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qzoom.backbones.onednn import fast_linear
from qzoom.backbones.packed import Rows, use_packed_attention
from qzoom.backbones.quantized import plain_copy
from qzoom.config import TokenBudget
from qzoom.errors import ConfigError
from qzoom.images.geometry import fit_grid

if TYPE_CHECKING:
    import PIL.Image


Rotary = tuple[Tensor, Tensor]
LabelHeads = Mapping[tuple[int, int], Mapping[str, tuple[str, str]]]
"""(hidden size, layers) -> kind of question ("text", "natural") -> pointing heads and sink heads ("22:1,4 23:6,11")."""


@dataclass(frozen=True, slots=True)
class VisualFeatures:
    """One encoded picture."""

    tokens: Tensor  # (n, hidden) embeddings that take the place of the image placeholders, row by row
    # one (n, hidden) tensor per DeepStack level, added after decoder layers 0, 1, ...; may be empty
    deepstack: tuple[Tensor, ...]
    # (rows, columns) of merged cells, rows * columns = n unless `kept`; (1, n) where some tokens stand side by side
    grid: tuple[int, int]
    size_px: tuple[int, int]  # (width, height) that the vision encoder saw
    kept: Tensor | None = None  # (n,) ascending indices of the cells whose tokens are read; None: all


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The sizes of a vision encoder, from which its FLOPs are counted."""

    vision_layers: int  # of the encoder
    vision_hidden: int  # width of its hidden states
    vision_feed: int  # width inside its MLPs
    vision_gated: bool  # whether its MLPs have three maps instead of two
    vision_full_layers: int  # layers that attend to the whole picture; the others attend within windows
    window_patches: int  # patches of a window; 0 without windows
    patch_values: int  # numbers in one patch
    merge: int  # patches per side of a visual token
    mergers: int  # projections into the decoder's width, DeepStack levels included


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What decides how many weights a model has, so that a run can be planned without loading it."""

    hidden: int  # width of the decoder
    intermediate: int  # width inside its MLPs
    layers: int  # of the decoder
    heads: int  # query heads
    kv_heads: int  # key heads
    head_dim: int  # of each
    vocabulary: int  # tokens
    tied: bool  # whether lm_head is the token table
    vision: int  # weights of the vision encoder and projector
    qkv_bias: bool = False  # whether queries, keys and values have biases
    qk_norm: bool = False  # whether queries and keys have norms

    @property
    def attention_in(self) -> int:
        """Weights of queries, keys and the norms before them in one layer."""
        width = (self.heads + self.kv_heads) * self.head_dim
        extra = (width if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        return self.hidden * width + extra + self.hidden

    @property
    def layer(self) -> int:
        """Weights of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        values = self.hidden * keys + (keys if self.qkv_bias else 0)
        return self.attention_in + values + queries * self.hidden + 3 * self.hidden * self.intermediate + self.hidden

    @property
    def table(self) -> int:
        """Weights of the token table."""
        return self.vocabulary * self.hidden

    @property
    def base(self) -> int:
        """Weights of the base model."""
        tables = self.table * (1 if self.tied else 2)
        return self.layers * self.layer + self.hidden + tables + self.vision


@dataclass(frozen=True, slots=True)
class ReleasedLayout:
    """A model's files as the family's authors write them, where transformers does not read them."""

    # their config.json and the vision tower's, if there is one, to transformers' config
    config: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Any]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]  # transformers' config.json to theirs
    # a stored tensor's name, in any layout of the family, to transformers'; None for what is not used
    stock_name: Callable[[str], str | None]
    released_name: Callable[[str], str]  # transformers' name to theirs
    tower: str  # start of transformers' names of the vision tower, which may lie in a folder of its own
    tower_setting: str  # the key of config.json that names that folder
    copies: Mapping[str, str]  # further names in their files and the tensors that they copy
    table: tuple[str, ...]  # transformers' names of the tensors with one row per token


class Backbone(ABC):
    """One loaded vision-language model.

    Args:
        model: the transformers model, in eval mode.
        tokenizer: its fast tokenizer, with a chat template.
        image_processor: its image processor.
        chat_template: a template that overrides the tokenizer's own.
    """

    family: ClassVar[str]
    """`config.model_type` of the family."""
    default_sink: ClassVar[str] = "none"
    """The release's sink rule for the family's region maps; see `ZoomConfig.sink`."""
    transformers: ClassVar[str] = ""
    """The first release of transformers that has the family; empty where every supported one has."""
    decoder_maps: ClassVar[str] = r"(self_attn|mlp)\.\w+_proj"
    """Regular expression of the names of a decoder layer's linear maps, for LoRA."""
    unquantized: ClassVar[tuple[str, ...]] = ("lm_head", r".*\.(visual|vision_tower|multi_modal_projector)")
    """Ends or patterns of names of modules that stay in full precision when a base is loaded in 4 or 8 bit."""
    square_padding: ClassVar[tuple[int, int, int] | None] = None
    """RGB of the margins, where `encode` pads pictures to squares, which the grid then spans; else None."""
    fixed_grid: ClassVar[bool] = False
    """Whether every view takes the same number of tokens, `default_budget`'s, whatever its size."""
    chat_format: ClassVar[str] = ""
    """Chat template for checkpoints of the family that have none."""
    placeholder: ClassVar[str] = ""
    """What users of the family write into questions where a picture goes; refused, since the picture is given apart."""
    vision_maps: ClassVar[str] = r"\w*(proj|fc)\w*"
    """Regular expression of the names of the vision tower's linear maps, for LoRA."""
    published: ClassVar[Mapping[str, ModelSizes]] = {}
    """Sizes of published bases by hub id."""
    label_heads: ClassVar[LabelHeads] = {}
    """Attention heads from which region labels of published bases are made (docs/method.md 5.1)."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template or tokenizer.chat_template
        self.folder: Path | None = None
        """Where its weights were loaded from, which LoRA matrices beside a quantised base are checked against."""
        self.packs = use_packed_attention(self.text_config)
        """Whether sequences of different lengths can run side by side, packed; else each runs alone."""

    @classmethod
    def zoom_defaults(cls) -> dict[str, Any]:
        """Fields of `ZoomConfig` in which the family's release differs from the class's own defaults."""
        return {"sink": cls.default_sink}

    released: ClassVar[ReleasedLayout | None] = None
    """The layout of the authors' files, where transformers does not read it."""

    @classmethod
    def released_layout(cls, settings: Mapping[str, Any]) -> ReleasedLayout | None:
        """`released`, if a folder with this config.json has it (CheckpointError: a variant of the family that is not
        supported)."""
        return None

    @classmethod
    def image_processor_for(cls, settings: Mapping[str, Any]) -> Any:
        """The image processor of folders that have none of their own; None where they must."""
        return None

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        """The decoder's own config."""
        return self.model.config.get_text_config()

    @property
    def num_layers(self) -> int:
        """N, the number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the decoder's hidden states."""
        return int(self.text_config.hidden_size)

    @property
    def max_positions(self) -> int:
        """Most prompt and answer tokens the decoder was built for."""
        return int(self.text_config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the decoder computes; its rotary table is there even when the weights are elsewhere."""
        return next(self.decoder.rotary_emb.buffers()).device  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's number format."""
        return self.embedding.weight.dtype

    @property
    @abstractmethod
    def token_px(self) -> int:
        """Side of the square of resized pixels that one visual token covers."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """Id of the placeholder that a visual token replaces."""

    @property
    @abstractmethod
    def image_delimiters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids that open and close a block of visual tokens (each may be empty)."""

    @property
    @abstractmethod
    def position_axes(self) -> int:
        """Axes of a position: 3 with M-RoPE, else 1."""

    @property
    @abstractmethod
    def deepstack_levels(self) -> int:
        """How many decoder layers get visual features added after them."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those of the generation config, and the tokenizer's own, which some configs lack."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = list(configured) if isinstance(configured, list | tuple) else [configured]
        return tuple(dict.fromkeys(int(one) for one in (*ids, self.tokenizer.eos_token_id) if one is not None))

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The module that owns `layers`, `norm`, `rotary_emb` and `embed_tokens`."""

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """Vision encoder and projector: what stays frozen when only the decoder trains."""

    @property
    def decoder_name(self) -> str:
        """The decoder's dotted name inside the model, as tensor names begin."""
        return self._name_of(self.decoder)

    def lora_targets(self, *, vision: bool = False) -> str:
        """Regular expression of the linear maps that LoRA matrices are put beside. `vision`: those of the vision tower
        as well."""
        maps = rf".*{re.escape(self.decoder_name)}\.layers\.\d+\.{self.decoder_maps}"
        if not vision:
            return maps
        return rf"({maps})|(.*{re.escape(self._name_of(self.vision_tower))}\..*\.{self.vision_maps})"

    def _name_of(self, part: nn.Module) -> str:
        return next(name for name, module in self.model.named_modules() if module is part)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.decoder.layers  # type: ignore[return-value]

    @property
    def embedding(self) -> nn.Embedding:
        """The token table."""
        return self.model.get_input_embeddings()

    def new_branch_layer(self, index: int) -> nn.Module:
        """A decoder layer of the family's own class, a copy of base layer `index` (its weights included). `index`: the
        base layer it starts from, 0-based."""
        return plain_copy(self.layers[index], self.dtype)

    # -- pictures ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def default_budget(self) -> TokenBudget:
        """The image processor's own limits, in visual tokens."""

    def grid(self, size_px: tuple[int, int], budget: TokenBudget | None) -> tuple[int, int]:
        """Rows and columns that `encode` gives a picture, by arithmetic alone; what cannot fit is refused by it.

        Families whose grid does not follow the Qwen-VL processors' rule replace it.

        Args:
            size_px: (width, height) of the picture.
            budget: limits on visual tokens; None uses the image processor's own.
        """
        return fit_grid(*size_px, self.token_px, budget or self.default_budget())

    def resize(self, image: PIL.Image.Image, budget: TokenBudget | None) -> PIL.Image.Image:
        """A picture in the size that `encode` gives it. `budget`: limits on visual tokens; None uses the image
        processor's own."""
        from PIL import Image

        rows, columns = self.grid(image.size, budget)
        size = (columns * self.token_px, rows * self.token_px)
        resample = Image.Resampling(int(self.image_processor.resample))
        return image if image.size == size else image.resize(size, resample)

    @abstractmethod
    def pixels(self, image: PIL.Image.Image, budget: TokenBudget | None) -> tuple[Tensor, Tensor]:
        """A picture resized and normalised, as the model's own forward pass takes it.

        Args:
            budget: limits on visual tokens; None uses the image processor's own.

        Returns:
            The pixel values, several pictures being joined along the first axis, and the patch grid (1, 3) int64: one
            frame, rows, columns.
        """

    def vision_shape(self) -> VisionShape:
        """Sizes of the vision encoder, from which FLOPs are counted (ConfigError: the family does not state them)."""
        raise ConfigError(f"FLOPs cannot be counted for models of type {self.family!r}, which state no vision shape.")

    def map_view(self, view: Literal["dynamic", "square"]) -> Literal["dynamic", "square"]:
        """How a map shows its picture: "square" where the caller ("square") or `encode` padded it to one."""
        return view if self.square_padding is None else "square"

    def need_bare_grid(self, what: str) -> None:
        """Refuse work that takes a map for the picture alone (ConfigError), where `encode` pads pictures."""
        if self.square_padding is not None:
            raise ConfigError(f"{what} does not work with models that pad pictures to squares, such as this one.")

    def crop(self, image: PIL.Image.Image, box: tuple[int, int, int, int]) -> PIL.Image.Image:
        """A region as `encode` is to get it. `image`: the whole picture, RGB. `box`: xyxy in its pixels, half-open."""
        return image.crop(box)

    @abstractmethod
    def encode(self, images: Sequence[PIL.Image.Image], budgets: Sequence[TokenBudget | None]) -> list[VisualFeatures]:
        """Resize, normalise and encode pictures in one call of the vision encoder. `budgets`: limits on visual tokens
        for each; None uses the image processor's own."""

    # -- tokens ------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids of any shape (...,) to embeddings (..., hidden)."""
        return self.embedding(ids)

    @abstractmethod
    def positions(self, ids: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Stock position ids of one sequence.

        Args:
            ids: (length,) token ids with the placeholders expanded.
            grids: (rows, columns) in merged cells of every picture in the sequence, in order.

        Returns:
            (axes, length) int64; axes is 3 with M-RoPE (time, height, width), else 1.
        """

    # -- decoder -----------------------------------------------------------------------------------------------------

    def computing(self) -> AbstractContextManager[Any]:
        """What layers, encoder and head are best run within: the fastest linear maps for this model and processor."""
        return fast_linear(self.device, self.dtype, self.hidden_size)

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Cosines and sines for positions (axes, batch, length), which may be fractional."""
        stock = positions if self.position_axes > 1 else positions[0]
        return self.decoder.rotary_emb(hidden, stock)  # type: ignore[operator]

    def run_layer(self, layer: nn.Module, hidden: Tensor, rotary: Rotary, mask: Tensor | None, cache: Any) -> Tensor:
        """One decoder layer.

        Args:
            layer: a base or branch layer.
            hidden: (batch, queries, hidden).
            rotary: cosines and sines for the queries.
            mask: additive (batch, 1, queries, keys), or None for plain causal attention.
            cache: what the layer needs to go on: a `KVCache` of the batch, `Rows` of packed sequences, or None.
        """
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        return out[0] if isinstance(out, tuple) else out

    def run_last(self, layer: nn.Module, hidden: Tensor, rotary: Rotary, rows: Rows) -> Tensor:
        """One decoder layer over packed rows, for each row's last token alone: (1, rows, hidden).

        The other tokens give keys and values only.

        Args:
            layer: a base or branch layer.
            hidden: (1, tokens, hidden), the rows side by side.
            rotary: cosines and sines for them.
            rows: lengths and caches.
        """
        if max(rows.new) > 1:
            before, rows, earlier, ends = rows.last()
            keys, values = self.key_value(layer, hidden[:, earlier], (rotary[0][:, earlier], rotary[1][:, earlier]))
            before.update(keys, values, self.layer_index(layer))
            hidden, rotary = hidden[:, ends], (rotary[0][:, ends], rotary[1][:, ends])
        return self.run_layer(layer, hidden, rotary, rows.mask, rows)

    def layer_index(self, layer: nn.Module) -> int:
        """The slot of a layer in the cache."""
        return int(layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Decoder layers that have queries and keys for every token, from which a map can be read."""
        return tuple(range(self.num_layers))

    def check_depth(self, shared_layers: int, branch_layers: int) -> None:
        """Refuse branches whose last layer, from which the region map comes, has no queries and keys (ConfigError: K +
        T exceeds the base's layers, or ends on a layer of another kind)."""
        total = shared_layers + branch_layers
        if total > self.num_layers:
            raise ConfigError(
                f"K={shared_layers} shared and T={branch_layers} branch layers need {total} base layers, but the base "
                f"has {self.num_layers}; choose a smaller K or T."
            )
        allowed = [index + 1 for index in self.attention_layers]
        if total not in allowed:
            raise ConfigError(
                f"K={shared_layers} and T={branch_layers} make layer {total} of the base the region branch's last, but "
                "it is a linear-attention layer, which has no queries and keys to make a map of; choose K + T out of "
                f"{', '.join(map(str, allowed))}."
            )

    def nearest_depth(self, shared_layers: int, branch_layers: int) -> int:
        """The K nearest to a wish with which `check_depth` agrees."""
        choices = [index + 1 - branch_layers for index in self.attention_layers if index + 1 > branch_layers]
        return min(choices, key=lambda depth: (abs(depth - shared_layers), -depth), default=shared_layers)

    @abstractmethod
    def query(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated queries (batch, heads, length, head_dim) of a layer for its inputs (batch, length, hidden)."""

    @abstractmethod
    def key(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Rotated keys (batch, kv_heads, length, head_dim) of a layer for its inputs."""

    @abstractmethod
    def key_value(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (batch, kv_heads, length, head_dim) of a layer for its inputs."""

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Output of the last layer (..., hidden) to logits (..., vocabulary) in float32."""
        with self.computing():
            return self.model.lm_head(self.decoder.norm(hidden)).float()  # type: ignore[operator]
