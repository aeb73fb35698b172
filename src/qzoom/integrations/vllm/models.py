"""vLLM's model classes with one more cache layer, in which the hidden states after the shared layers are kept.

A checkpoint needs no change: `hf_overrides` chooses the class and names the checkpoint (see `arguments`). The states
share the block tables of keys and values, so prefix hits, chunks and preemption need nothing of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import vllm
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models import llava, qwen2_5_vl, qwen3_vl
from vllm.model_executor.models.extract_hidden_states import (
    CacheOnlyAttentionBackend,
    CacheOnlyAttentionLayer,
    CacheOnlyAttentionMetadataBuilder,
    basic_cache,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.attention.backend import AttentionCGSupport

from qzoom.checkpoints.upstream import is_branch_key
from qzoom.errors import ConfigError
from qzoom.integrations.vllm import version_warning
from qzoom.integrations.vllm.heads import Heads

_log = init_logger(__name__)
_TOWER = r"^((?:model\.)?vision_tower\.)(?!vision_model\.)"


class _Builder(CacheOnlyAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.ALWAYS  # vLLM's own says NEVER, which holds for the whole model


class _Backend(CacheOnlyAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder


class StatesLayer(CacheOnlyAttentionLayer):
    """The cache of hidden states, and the branches that read it."""

    heads: Heads | None = None
    """On the first rank, once the weights are loaded."""

    def get_attn_backend(self) -> type[_Backend]:
        """The backend that lets vLLM capture CUDA graphs."""
        return _Backend

    def keep(self, states: torch.Tensor) -> None:
        """Write the states (tokens, hidden) of this step into its slots."""
        slots = get_forward_context().slot_mapping
        own = slots.get(self.layer_name) if isinstance(slots, dict) else None
        if own is not None and self.kv_cache.numel():  # neither while memory is measured
            basic_cache(states[: own.shape[0], None], self.kv_cache, own)


class KeepsStates:
    """What the subclasses add to a model class of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if get_pp_group().world_size > 1:
            raise ConfigError("qzoom's plug-in does not run with pipeline parallelism; use tensor parallelism.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if warning := version_warning(vllm.__version__):
            _log.warning(warning)
        model, cache = vllm_config.model_config, vllm_config.cache_config
        self._checkpoint = str(model.hf_config.qzoom_checkpoint)
        self._dtype = model.dtype
        text = model.hf_text_config
        if cache is not None and cache.cache_dtype not in ("auto", "bfloat16", "float16"):
            cache = replace(cache, cache_dtype="auto")  # states are not quantised
        # The name must hold exactly one number, which must not be that of a real layer.
        self.qzoom_states = StatesLayer(1, text.hidden_size, cache, prefix=f"qzoom_states.{text.num_hidden_layers}")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base from the folder, whose branches are left out, then the branches on the first rank.

        Here and not in the connector, which comes when the cache has taken the rest of the memory.
        """
        base = (pair for pair in weights if not pair[0].startswith(("gate.", "region.")) and not is_branch_key(pair[0]))
        loaded: set[str] = super().load_weights(base)  # type: ignore[misc]
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        heads = Heads(self._checkpoint, device, self._dtype)
        self.set_aux_hidden_state_layers((heads.engine.config.shared_layers,))  # type: ignore[attr-defined]
        if get_tensor_model_parallel_rank() == 0:
            self.qzoom_states.heads = heads
        return loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward pass; the states that come beside its result are kept."""
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, tuple):
            out, (states,) = out
            self.qzoom_states.keep(states)
        return out


@MULTIMODAL_REGISTRY.register_processor(
    qwen3_vl.Qwen3VLMultiModalProcessor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class QZoomQwen3VLForConditionalGeneration(KeepsStates, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL that looks."""


@MULTIMODAL_REGISTRY.register_processor(
    qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class QZoomQwen2_5_VLForConditionalGeneration(KeepsStates, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that looks."""


@MULTIMODAL_REGISTRY.register_processor(
    llava.LlavaMultiModalProcessor, info=llava.LlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class QZoomLlavaForConditionalGeneration(KeepsStates, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 that looks."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The same with the names of transformers 5, which have one level less in the vision tower."""
        return super().load_weights((re.sub(_TOWER, r"\1vision_model.", name), value) for name, value in weights)
