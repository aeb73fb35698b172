"""Small random models of both families, with a byte-level tokenizer, image processor and chat template.

The weights know nothing; they are scaled so that hidden states, gate scores and region maps differ between questions.
Everything is made from fixed seeds, so every test sees the same numbers.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qzoom.backbones.base import Backbone
from qzoom.backbones.registry import build_backbone
from qzoom.config import ZoomConfig
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import coarse_pass
from qzoom.engine.perceive import Stopwatch
from qzoom.engine.request import Options, make_request
from qzoom.engine.state import Engine
from qzoom.heads.branches import new_gate, new_region

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
"""With a test of their own in every room."""
HYBRIDS = ("qwen3_5", "qwen3_5_moe")
GLM = ("glm4v", "glm46v")
EVERY = (*FAMILIES, "llava", "qwen3_vl_moe", *HYBRIDS, *GLM)
"""With the shared tests of tests/backbones/test_families.py."""
CLASSES = {"qwen3_vl": "Qwen3VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl_moe": "Qwen3VLMoe"}
CLASSES |= {"llava": "Llava", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe", "glm4v": "Glm4v", "glm46v": "Glm46V"}
HIDDEN = 64
LAYERS = 7
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
CORPUS = (
    "What is the total amount on this receipt?",
    "What is the date of the invoice, and who is the company?",
    "How many red circles are there to the left of the blue square?",
    "the total of the items and the tax on the bill",
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, about a hundred merges, seven special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@cache
def llava_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a placeholder for pictures of its own."""
    own = copy.deepcopy(tokenizer())
    own.add_tokens(["<image>"], special_tokens=True)
    own.chat_template = None
    return own


def token_id(text: str) -> int:
    """Id of a special token."""
    return int(tokenizer().convert_tokens_to_ids(text))


def image_processor(family: str, min_tokens: int = 4, max_tokens: int = 30) -> Any:
    """A processor whose own limits are small enough for fast tests."""
    if family == "llava":
        return CLIPImageProcessorPil()
    patch = 14 if family in ("qwen2_5_vl", *GLM) else 16
    cell = (2 * patch) ** 2 * (2 if family in GLM else 1)
    kind: Any = Glm4vImageProcessorPil if family in GLM else Qwen2VLImageProcessorPil
    return kind(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": min_tokens * cell, "longest_edge": max_tokens * cell},
    )


def model_config(family: str, **text: Any) -> Any:
    """The stock config at a small size: Qwen3-VL with three DeepStack levels, Qwen2.5-VL with windowed vision."""
    if family == "llava":
        return _llava_config(**text)
    ids = {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }
    decoder = {
        "vocab_size": len(tokenizer()), "hidden_size": HIDDEN, "intermediate_size": 96,
        "num_hidden_layers": 8 if family in HYBRIDS else LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"), "tie_word_embeddings": False, **text,
    }  # fmt: skip
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN}
    head_dim = HIDDEN // decoder["num_attention_heads"]
    eighth = head_dim // 8
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    kind = getattr(transformers, f"{CLASSES[family]}Config")
    tied = {"tie_word_embeddings": decoder["tie_word_embeddings"]}
    if family.endswith("moe"):
        experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        decoder |= experts | {"shared_expert_intermediate_size": 48} if family in HYBRIDS else experts
    if family in HYBRIDS:
        rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        sizes |= {"linear_key_head_dim": 32, "linear_value_head_dim": 8, "head_dim": 32}
        vision |= {"patch_size": 16, "num_position_embeddings": 64}
        return kind(text_config=decoder | sizes | {"rope_parameters": rope}, vision_config=vision, **tied, **ids)
    if family in GLM:
        rope |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        vision |= {"patch_size": 14, "image_size": 112}
        ids |= {"image_start_token_id": ids.pop("vision_start_token_id")}
        ids |= {"image_end_token_id": ids.pop("vision_end_token_id")}
        return kind(text_config=decoder | {"rope_parameters": rope}, vision_config=vision, **tied, **ids)
    if family != "qwen2_5_vl":
        rope |= {"mrope_section": [2 * eighth, eighth, eighth], "mrope_interleaved": True}
        vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
        text = decoder | {"head_dim": head_dim, "rope_parameters": rope}
        return kind(text_config=text, vision_config=vision, **tied, **ids)
    rope |= {"mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2]}
    return kind(
        text_config=decoder | {"rope_parameters": rope, "use_sliding_window": False},
        vision_config=vision
        | {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
        **tied,
        **ids,
    )


def _llava_config(**text: Any) -> Any:
    """Squares of 84 px, so 6 x 6 cells; like converted checkpoints, with a row for the placeholder."""
    decoder = {
        "vocab_size": len(llava_tokenizer()), "hidden_size": HIDDEN, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"), **text,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=84, patch_size=14),
        text_config=LlamaConfig(**decoder),
        image_token_index=int(llava_tokenizer().convert_tokens_to_ids("<image>")),
        tie_word_embeddings=False,
    )


def build_model(family: str, *, seed: int = 0, attn: str = "sdpa", **text: Any) -> Any:
    """The stock transformers model with random float32 weights from a seed."""
    kind = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")
    config = model_config(family, **text)
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                if ".experts." in name:
                    weight.normal_(0.0, weight.shape[-1] ** -0.5)
                elif weight.ndim >= 2:
                    weight.normal_(0.0, 1.0 if "embed" in name else weight[0].numel() ** -0.5)
                elif family in HYBRIDS and "norm" in name and "visual" not in name and "linear_attn" not in name:
                    weight.normal_(0.0, 0.1)  # centred on zero
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.1)
            model.lm_head.weight.normal_(0.0, 3 * HIDDEN**-0.5)
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    model.generation_config.do_sample = False
    return model.requires_grad_(False)


def build_tiny_backbone(
    family: str, *, seed: int = 0, attn: str = "sdpa", dtype: torch.dtype = torch.float32
) -> Backbone:
    """A random model behind the backbone protocol."""
    own = llava_tokenizer() if family == "llava" else tokenizer()
    return build_backbone(build_model(family, seed=seed, attn=attn).to(dtype), own, image_processor(family))


def build_engine(
    family: str,
    *,
    shared_layers: int = 0,
    branch_layers: int = 3,
    seed: int = 0,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    heads: bool = True,
    backbone: Backbone | None = None,
    **config: Any,
) -> Engine:
    """A random model with branches whose scores and maps vary from question to question.

    Args:
        shared_layers: K; 0 for 3, or what is nearest to it and can be.
        heads: whether to make the gate and the region branch.
        backbone: wraps this one instead of a new random model.
        **config: further fields of `ZoomConfig`.
    """
    backbone = backbone or build_tiny_backbone(family, seed=seed, attn=attn, dtype=dtype)
    shared_layers = shared_layers or backbone.nearest_depth(3, branch_layers)
    values = backbone.zoom_defaults() | {"gate_threshold": 0.5, "region_threshold": 0.6} | config
    made = ZoomConfig(shared_layers=shared_layers, branch_layers=branch_layers, **values)
    if not heads:
        return Engine(backbone, None, None, made)
    gate = new_gate(backbone, shared_layers, branch_layers)
    region = new_region(backbone, shared_layers, branch_layers, norm=made.branch_norm)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for branch in (gate, region):
            for name, weight in sorted(branch.named_parameters()):
                noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                if name == "head.weight":
                    weight.copy_(noise * HIDDEN**-0.5)
                elif weight.ndim >= 2:
                    weight.add_(noise * 0.3 * weight.shape[1] ** -0.5)
        for part in (region.layers[-1].self_attn.q_proj, region.layers[-1].self_attn.k_proj):
            part.weight.mul_(2.0)
        if hasattr(region.layers[-1].self_attn, "k_norm"):
            norm = region.layers[-1].self_attn.k_norm.weight
            norm.copy_(2 * norm + 1 if backbone.family in HYBRIDS else 2 * norm)
    out = Engine(backbone, gate.eval().requires_grad_(False), region.eval().requires_grad_(False), made)
    _centre_gate(out)
    return out


def _centre_gate(made: Engine) -> None:
    """Set the gate's bias so that about half of all questions score above one half."""
    chat = ChatEncoder(made.backbone)
    requests = [make_request(chat, picture(i, 160 + 20 * i), f"Sample {i}?", Options()) for i in range(6)]
    hidden = coarse_pass(made, requests, Stopwatch(made.backbone.device))
    logits = sorted(math.log(item.gate.score / (1 - item.gate.score)) for item in hidden if item.gate.score is not None)
    assert made.gate is not None
    with torch.no_grad():
        made.gate.head.bias.sub_((logits[2] + logits[3]) / 2)


@cache
def engine(family: str, **options: Any) -> Engine:
    """`build_engine`, made once per set of options: for tests that do not change it."""
    return build_engine(family, **options)


def picture(seed: int, width: int = 200, height: int = 140) -> Image.Image:
    """A picture of coloured noise blocks, different for every seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
