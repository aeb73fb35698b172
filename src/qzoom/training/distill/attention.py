"""Plain matrix-product attention for packed questions of small models on a CPU, for as long as a loss is computed.

The engine, which validates between steps, and sampling go on with the stock kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["packed_attention"]


@contextlib.contextmanager
def packed_attention(model: Any, inputs: Mapping[str, Any], wanted: bool) -> Iterator[None]:
    """Use `training.attention` inside the block, for inputs with a 4-D mask.

    Args:
        model: a Qwen3-VL model, or a wrapper around it.
        inputs: of the forward pass.
        wanted: whether to use it at all.
    """
    config = model.config
    if not wanted or inputs["attention_mask"].ndim != 4:
        yield
        return
    from qzoom.training.attention import use_plain_attention

    parts = (config.text_config, config.vision_config)
    before = [part._attn_implementation for part in parts]
    stock = getattr(model, "get_base_model", lambda: model)()
    try:
        use_plain_attention(stock)
        yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part._attn_implementation = name
