"""Losses and gradients of the three training stages, through the engine's own layers and `training.losses`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.cache import KVCache
from qzoom.engine.layers import SequenceSlice, run_layers
from qzoom.engine.perceive import region_maps
from qzoom.engine.prompt import Prompt, build_prompt, embed_prompt
from qzoom.engine.state import Engine, State, advance_gate, advance_region, advance_shared
from qzoom.engine.zoom import RegionBlock, insert_regions
from qzoom.heads.boxes import boxes_from_maps
from qzoom.training.losses import IGNORE, answer_loss, gate_loss, region_loss
from tests.parity.model_cases import EXACT, MAP, POSITION, Tensors, grid_thw
from tests.parity.model_folder import ModelFolder
from tests.parity.report import Case

RELATIVE, ABSOLUTE = 1e-4, 1e-7
_PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


def insert_ignored(labels: torch.Tensor, at: int, count: int) -> torch.Tensor:
    """Labels (length,) with room for a region block: ignored ones in front of index `at`."""
    return torch.cat([labels[:at], labels.new_full((count,), IGNORE), labels[at:]])


def run_training_case(case: Case, folder: ModelFolder, name: str, entry: dict[str, Any]) -> None:
    """One recorded loss with its gradients.

    Args:
        case: takes the errors.
        folder: the model.
        name: "stage1.*", "stage2.*" or "stage3.*".
        entry: its record in training.json.
    """
    engine = folder.engine(f"model/configs/{entry['variant']}.json")
    saved = Tensors(folder.tensors(f"training/{name}.safetensors"))
    stage = name.split(".")[0]
    trained = trained_weights(engine, stage, entry["grad_l2_norms"])
    pictures = [folder.picture(path) for path in entry["images"]]
    with torch.no_grad():
        features = engine.backbone.encode(pictures, [None] * len(pictures))
    prompts = [_prompt(case, engine, saved, entry, row, item) for row, item in enumerate(features)]
    try:
        for weight in trained.values():
            weight.requires_grad_(True)
        if stage == "stage1":
            loss = _stage1(engine, saved, prompts)
        elif stage == "stage2":
            loss = _stage2(case, engine, saved, entry, prompts[0], pictures[0])
        else:
            loss = _stage3(engine, saved, prompts)
        case.require("loss has a graph", loss.requires_grad, "backward is not possible")
        loss.backward()
        compare_gradients(case, saved, entry, loss, trained)
    finally:
        for weight in trained.values():
            weight.grad = None
            weight.requires_grad_(False)
    case.require("every tensor compared", not saved.left, f"not compared: {saved.left}")


def trained_weights(engine: Engine, stage: str, listed: Iterable[str]) -> dict[str, nn.Parameter]:
    """What a stage trains, and whatever else is listed, by the name that follows the prefix in the recorded keys."""
    every = {f"lm_head.{name}": weight for name, weight in engine.backbone.model.lm_head.named_parameters()}
    every |= dict(engine.backbone.decoder.named_parameters())
    if engine.region is not None:
        every |= {f"twig_{name}": weight for name, weight in engine.region.named_parameters()}
    if engine.gate is not None:
        every |= {f"high_res_{name}": weight for name, weight in engine.gate.named_parameters()}
    starts = {"stage1": ("twig_",), "stage2": ("layers.", "lm_head."), "stage3": ("high_res_",)}[stage]
    names = [name for name in every if name.startswith(starts)]
    own = {id(every[name]): name for name in [*names, *(_PREFIX.sub("", key) for key in listed)]}  # tied: listed name
    return {name: every[name] for name in own.values()}


def _prompt(
    case: Case, engine: Engine, saved: Tensors, entry: dict[str, Any], row: int, features: VisualFeatures
) -> Prompt:
    """The sample's whole sequence, answer included, made from its text."""
    backbone = engine.backbone
    ids = backbone.tokenizer(entry["texts_expanded"][row], add_special_tokens=False)["input_ids"]
    keep = [i == 0 or token != backbone.image_token_id or ids[i - 1] != token for i, token in enumerate(ids)]
    prompt = build_prompt(backbone, list(itertools.compress(ids, keep)), [features])
    length = _length(saved, row)
    case.equal("input_ids", prompt.ids, saved["input_ids"][row][:length])
    case.equal("position_ids", prompt.positions, saved["position_ids"][:, row, :length])
    case.equal("image_grid_thw", grid_thw(engine, features), saved["image_grid_thw"][row])
    labels = saved["labels"][row]
    wanted = torch.where(labels == IGNORE, labels, saved["input_ids"][row])
    case.equal("labels are the ids", labels, wanted)
    return prompt


def _length(saved: Tensors, row: int) -> int:
    if "attention_mask" in saved:
        return int(saved["attention_mask"][row].sum())
    return int(saved["input_ids"].shape[1])


def _question(saved: Tensors, row: int, prompt: Prompt) -> Prompt:
    """The sample up to the token before its answer, which asks gate and region branch."""
    first = int((saved["labels"][row] != IGNORE).nonzero()[0])
    return Prompt(prompt.ids[:first], prompt.positions[:, :first], prompt.spans)


def _looked(engine: Engine, prompts: Sequence[Prompt]) -> list[State]:
    with torch.no_grad():
        return advance_shared(engine, [State.empty(engine, prompt) for prompt in prompts])


def _stage1(engine: Engine, saved: Tensors, prompts: Sequence[Prompt]) -> Tensor:
    questions = [_question(saved, row, prompt) for row, prompt in enumerate(prompts)]
    states = advance_region(engine, _looked(engine, questions))
    logits = [region_maps(engine, state)[0].logits for state in states]
    return region_loss(logits, [saved[f"roi_target_map.{row}"] for row in range(len(prompts))])


def _stage3(engine: Engine, saved: Tensors, prompts: Sequence[Prompt]) -> Tensor:
    assert engine.gate is not None
    questions = [_question(saved, row, prompt) for row, prompt in enumerate(prompts)]
    _, hidden = advance_gate(engine, _looked(engine, questions))
    return gate_loss(engine.gate.logit(torch.stack(hidden)), saved["high_res_signal"])


def _stage2(case: Case, engine: Engine, saved: Tensors, entry: dict[str, Any], prompt: Prompt, picture: Any) -> Tensor:
    """Answer loss over the sequence with the region; without a box there is nothing to learn from the sample."""
    # The release's Qwen2.5-VL path asks with the last token of the whole sequence, its Qwen3-VL path as at inference.
    asked = prompt if engine.backbone.family == "qwen2_5_vl" else _question(saved, 0, prompt)
    with torch.no_grad():
        found = region_maps(engine, advance_region(engine, _looked(engine, [asked]))[0])[0]
    case.close("roi_logits", found.logits, saved["roi_logits"], MAP)
    case.close("blurred_prob", found.blurred, saved["blurred_prob"], MAP)
    boxes = boxes_from_maps(
        [found.blurred],
        [picture.size],
        threshold=entry["roi_conf_thresh"],
        rule=engine.config.box,
        token_px=engine.backbone.token_px,
    )
    labels = saved["labels"][0]
    case.equal("box found", bool(boxes), "roi_box_grid" in saved)
    if not boxes:
        return answer_loss(_logits(engine, prompt), torch.full_like(labels, IGNORE))
    with torch.no_grad():
        features = engine.backbone.encode([picture.crop(boxes[0].box)], [None])[0]
    case.equal("roi_box_grid", torch.tensor(boxes[0].cells).long(), saved["roi_box_grid"])
    case.equal("roi_grid_thw", grid_thw(engine, features), saved["roi_grid_thw"].reshape(-1))
    zoomed, at = insert_regions(engine.backbone, prompt, [RegionBlock(0, boxes[0].cells, features)], engine.config)
    count = len(zoomed) - len(prompt)
    case.equal("updated_input_ids", zoomed.ids, saved["updated_input_ids"][0])
    exact = not saved["updated_position_ids"].is_floating_point()
    case.close(
        "updated_position_ids", zoomed.positions, saved["updated_position_ids"][:, 0], EXACT if exact else POSITION
    )
    case.equal(
        "inserted_mask", insert_ignored(torch.zeros_like(labels), at, count) != 0, saved["inserted_mask"][0].bool()
    )
    return answer_loss(_logits(engine, zoomed), insert_ignored(labels, at, count))


def _logits(engine: Engine, prompt: Prompt) -> Tensor:
    """Logits (length, vocabulary) after every token."""
    backbone = engine.backbone
    hidden, deepstack = embed_prompt(backbone, prompt)
    row = SequenceSlice(hidden, prompt.positions, KVCache(), 0, deepstack)
    return backbone.lm_logits(run_layers(backbone, list(backbone.layers), [row], first_layer=0)[0].hidden)


def compare_gradients(
    case: Case,
    saved: Tensors,
    entry: dict[str, Any],
    loss: Tensor,
    trained: dict[str, nn.Parameter],
    *,
    loss_tolerance: float = ABSOLUTE,
) -> None:
    """The loss, the norm of every weight's gradient, and the gradients that were kept."""
    for recorded in (saved["loss"].item(), entry["loss"]):
        case.close("loss", loss.item(), recorded, loss_tolerance, relative=RELATIVE)
    norms = {_PREFIX.sub("", key): value for key, value in entry["grad_l2_norms"].items()}
    ours = {key: 0.0 if w.grad is None else w.grad.double().norm().item() for key, w in trained.items()}
    unlisted = [key for key, norm in ours.items() if norm and key not in norms]
    case.require("only the listed weights get a gradient", not unlisted, f"{unlisted}")
    for key, norm in norms.items():
        case.close("gradient norm", ours[key], norm, ABSOLUTE, relative=RELATIVE)
    for name in [n for n in saved.left if n.startswith("grad.")]:
        gradient = saved[name]
        scale = max(float(gradient.abs().max()), ABSOLUTE)
        own = trained[_PREFIX.sub("", name.removeprefix("grad."))].grad
        own = torch.zeros_like(gradient) if own is None else own
        case.close("gradient, share of its largest value", own / scale, gradient / scale, RELATIVE)
