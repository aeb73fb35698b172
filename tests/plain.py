"""What transformers itself answers: the same weights, its own prompt, forward pass and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.engine.prompt import Prompt, embed_prompt


def plain_inputs(backbone: Backbone, pictures: Sequence[Image.Image], question: str | list[dict[str, Any]]) -> Any:
    """`generate`'s arguments for a question about pictures, made with the processor's own resizing."""
    if isinstance(question, str):
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        question = [{"role": "user", "content": parts if pictures else question}]
    text = backbone.tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True, chat_template=backbone.chat_template
    )
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs: dict[str, Tensor] = {}
    if pictures and backbone.fixed_grid:
        inputs["pixel_values"] = torch.cat([backbone.pixels(picture, None)[0] for picture in pictures])
        count = backbone.default_budget().max_tokens
        ids = [i for one in ids for i in ([one] * count if one == backbone.image_token_id else [one])]
        inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return inputs | {"pixel_values": inputs["pixel_values"].to(backbone.dtype)}
    if pictures:
        inputs = dict(backbone.image_processor(images=list(pictures), return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(backbone.dtype)
        counts = iter((inputs["image_grid_thw"].prod(-1) // 4).tolist())
        pad = backbone.image_token_id
        ids = [token for one in ids for token in ([one] * next(counts) if one == pad else [one])]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if backbone.fixed_grid:
        return inputs
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == backbone.image_token_id).long()
    return inputs


@torch.inference_mode()
def plain_generate(
    backbone: Backbone, pictures: Sequence[Image.Image], question: str | list[dict[str, Any]], max_new_tokens: int
) -> tuple[list[int], Tensor]:
    """Greedy tokens and the float32 logits (steps, vocabulary) of each step."""
    inputs = plain_inputs(backbone, pictures, question)
    out = backbone.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits)[:, 0].float()


def full_pass(backbone: Backbone, prompt: Prompt) -> Tensor:
    """Logits of transformers' own decoder over the prompt, regions included, in one go."""
    hidden, deepstack = embed_prompt(backbone, prompt)
    visual = prompt.ids[None] == backbone.image_token_id
    extra = {}
    if deepstack is not None:
        extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": [level[visual[0]] for level in deepstack]}
    positions = prompt.positions[:, None] if backbone.position_axes > 1 else prompt.positions
    with torch.inference_mode():
        out = backbone.model.model.language_model(
            inputs_embeds=hidden[None], position_ids=positions, use_cache=False, **extra
        )
        return backbone.model.lm_head(out.last_hidden_state[0, -1])
