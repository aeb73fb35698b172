"""Floating-point operations of an answer, from the model's sizes alone; a multiply and an add count as two. Pure.

Matrix products are counted (projections, attention, feed-forward, mergers, logits), which are nearly all of the work;
norms, rotary positions and resizing are not. An answer is counted as if it were asked alone: the whole text follows the
image, and nothing is shared with other questions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qzoom.backbones.base import VisionShape
from qzoom.engine.state import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape(VisionShape):
    """Sizes that decide the cost: those of the vision encoder, and of the decoder."""

    layers: int
    hidden: int  # width of the decoder
    query: int  # width of all queries together
    key: int  # width of all keys together (values are as wide)
    feed: int  # width of the decoder's gated feed-forward layers
    vocabulary: int
    shared_layers: int  # K
    branch_layers: int  # T

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def shape_of(engine: Engine) -> ModelShape:
    """The sizes of a loaded model, from its config (ConfigError: its family states no vision shape)."""
    text = engine.backbone.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        layers=engine.backbone.num_layers,
        hidden=text.hidden_size,
        query=text.num_attention_heads * head,
        key=text.num_key_value_heads * head,
        feed=text.intermediate_size,
        vocabulary=text.vocab_size,
        shared_layers=engine.config.shared_layers,
        branch_layers=engine.config.branch_layers,
        **asdict(engine.backbone.vision_shape()),
    )


def vision_flops(shape: ModelShape, tokens: int) -> int:
    """Encoding a picture or crop to so many visual tokens."""
    width, patches = shape.vision_hidden, tokens * shape.merge**2
    linear = 2 * patches * (4 * width**2 + (3 if shape.vision_gated else 2) * width * shape.vision_feed)
    near = min(patches, shape.window_patches) if shape.window_patches else patches
    windowed = shape.vision_layers - shape.vision_full_layers
    attention = 4 * patches * width * (shape.vision_full_layers * patches + windowed * near)
    merged = width * shape.merge**2
    mergers = 2 * tokens * (merged**2 + merged * shape.hidden) * shape.mergers
    return 2 * patches * shape.patch_values * width + shape.vision_layers * linear + attention + mergers


def decoder_flops(shape: ModelShape, layers: int, new: int, past: int = 0) -> int:
    """Running decoder layers over `new` tokens, each of which sees the `past` ones and those before it."""
    linear = 2 * new * shape.hidden * (2 * shape.query + 2 * shape.key + 3 * shape.feed)
    return layers * (linear + 4 * shape.query * (new * past + new * (new + 1) // 2))


def answer_flops(
    shape: ModelShape,
    *,
    coarse_tokens: int,
    region_tokens: int,
    prompt_tokens: int,
    completion_tokens: int,
    gate: bool,
    region_branch: bool,
    encoded_tokens: int | None = None,
    looked_tokens: int = 0,
    reread_tokens: int = 0,
    upper_tokens: int = 0,
    other_tokens: int = 0,
    other_text_tokens: int = 0,
    other_completion_tokens: int = 0,
) -> int:
    """One answer.

    Args:
        region_tokens: of the regions; 0 when it did not zoom.
        prompt_tokens: the answered prompt's length, coarse view and crops included.
        encoded_tokens: that the vision encoder gave for the regions, where not all of them are read (sparse crops).
        looked_tokens: of the coarse answer, where it decides whether to zoom.
        reread_tokens: of the second crop, where the answer was read again; part of `region_tokens`.
        upper_tokens: of the question's own coarse prompt, where the upper layers ran over it before the zoom; the
            lower layers' pass is the one that is counted anyway.
        other_tokens: of the prompt of another question about the same pictures; the upper layers run over all of it.
        other_text_tokens: of these, those that follow the pictures; the lower layers run over them alone.
        other_completion_tokens: that the other question generated.
    """
    text = prompt_tokens - coarse_tokens - region_tokens
    region_tokens, prompt_tokens = region_tokens - reread_tokens, prompt_tokens - reread_tokens
    first = coarse_tokens + text
    total = vision_flops(shape, coarse_tokens) + decoder_flops(shape, shape.shared_layers, first)
    if gate:
        total += decoder_flops(shape, shape.branch_layers, first) + 2 * shape.hidden
    if region_branch:
        pointing = 2 * shape.hidden * (coarse_tokens * shape.key + shape.query) + 2 * shape.query * coarse_tokens
        total += decoder_flops(shape, shape.branch_layers - 1, first) + pointing
    if region_tokens:
        total += vision_flops(shape, region_tokens if encoded_tokens is None else encoded_tokens)
        total += decoder_flops(shape, shape.shared_layers, region_tokens + text, coarse_tokens)
    total += decoder_flops(shape, shape.layers - shape.shared_layers, prompt_tokens)
    total += _decoding(shape, prompt_tokens, completion_tokens)
    if looked_tokens:
        again = decoder_flops(shape, shape.layers - shape.shared_layers, text, coarse_tokens) if region_tokens else 0
        total += again + _decoding(shape, first, looked_tokens)
    if reread_tokens:
        total += vision_flops(shape, reread_tokens)
        total += decoder_flops(shape, shape.layers, reread_tokens + text, coarse_tokens)
        total += _decoding(shape, first + reread_tokens, completion_tokens)
    return total + _rounds(shape, upper_tokens, other_tokens, other_text_tokens, other_completion_tokens)


def _rounds(shape: ModelShape, own: int, other: int, text: int, completion: int) -> int:
    """What came on top of an answer: a look at its own coarse prompt, and another question; see `answer_flops`."""
    upper = shape.layers - shape.shared_layers
    total = 0
    if own:
        total += decoder_flops(shape, upper, own) + _decoding(shape, own, 1)
    if other:
        total += decoder_flops(shape, shape.shared_layers, text, other - text) + decoder_flops(shape, upper, other)
        total += _decoding(shape, other, max(1, completion))
    return total


def _decoding(shape: ModelShape, prompt: int, completion: int) -> int:
    """Generating: logits for every token, all layers for every token that is fed back."""
    back = max(0, completion - 1)
    return completion * 2 * shape.hidden * shape.vocabulary + (
        decoder_flops(shape, shape.layers, back, prompt) if back else 0
    )
