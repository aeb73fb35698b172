"""LLaVA-1.5 as SD-RPN's release answers: one question through the engine, its training cases, labels and boxes.

The release reads a group of cells that lies in the padding only as a black picture. The engine never reads one; there
the recorded crop is put in by hand, so that all recorded numbers are compared all the same. Widened boxes stop one cell
before the right and lower border in the release, which the recordings have and `widen_to_edge: false` gives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.config import BoxRule
from qzoom.engine.attention import ResponseAttention, response_attention
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import CoarseResult, region_maps
from qzoom.engine.prompt import Prompt, build_prompt
from qzoom.engine.request import Options, Request, make_request
from qzoom.engine.state import Engine, State, advance_region, advance_shared
from qzoom.engine.zoom import RegionBlock, insert_regions, read_tokens, zoom
from qzoom.heads.boxes import MapBox, bounds, cells_to_pixels, connected_groups, group_cells
from qzoom.heads.region_map import blur
from qzoom.labels.find_heads import published_heads
from qzoom.labels.maps import region_labels
from qzoom.labels.settings import LabelMapSettings
from qzoom.training.losses import IGNORE, region_loss
from qzoom.types import SamplingParams
from tests.parity.model_cases import HIDDEN, MAP, PIXEL, Tensors, clock_of, compare_answer, greedy, kept_pixels
from tests.parity.model_folder import ModelFolder
from tests.parity.report import Case, Report
from tests.parity.training_cases import ABSOLUTE, RELATIVE, compare_gradients, trained_weights

PICTURE = -200
LABEL_FILES = (
    "llava_box_to_pixels.json",
    "llava_map_to_boxes.json",
    "llava_map_to_boxes.safetensors",
    "llava_stage1_labels.json",
    "llava_stage1_labels.safetensors",
)
ATTENTION_FILES = ("llava_attention.json", "llava_attention.safetensors")
SINGLE_HEAD = {"roi_logits": 5e-4, "prob": 4e-5, "blurred_prob": 4e-5}
GROUPS = BoxRule(components="groups", min_cells=2, max_cells=225, widen_cells=3, min_side_px=1, widen_to_edge=False)


def run_case(case: Case, folder: ModelFolder, entry: dict[str, Any]) -> None:
    """A case of one question."""
    engine = _engine(folder, entry)
    saved = Tensors(folder.tensors(f"cases/{entry['id']}.safetensors"))
    request = _request(engine, folder, entry, saved["two_stage_ids"].shape[1])
    before = coarse_pass(engine, [request], clock_of(engine))[0]
    _prompt(case, engine, entry, saved, before)
    _picture(case, folder, engine, entry, before)
    _map(case, engine, entry, saved, before)
    grid = [tuple(box) for box in entry["roi_boxes_grid_xyxy"]]
    in_padding = [box for box in grid if not _has_pixels(engine, request, box)]
    if in_padding:
        shown = [item for item in before.boxes if item.box[2] > item.box[0] and item.box[3] > item.box[1]]
        case.equal("boxes that show the picture", len(shown), len(before.boxes))
        case.equal("zoomed", before.gate.zoomed, bool(shown))
        after = _as_recorded(engine, folder, entry, before) if entry["zoomed"] else _not_zoomed(before)
        if not shown:
            compare_answer(case, "direct", greedy(engine, [before])[0], saved, entry["direct_ids"], 0)
    else:
        case.equal("zoomed", before.gate.zoomed, bool(entry["zoomed"]))
        found = [[list(box.cells) for box in before.boxes], [list(box.box) for box in before.boxes]]
        case.equal("boxes", found, [entry["roi_box_grid_xyxy"] or [], entry["roi_box_pixel_xyxy"] or []])
        after = zoom(engine, [before], clock_of(engine))[0][0]
    if entry["zoomed"]:
        _crops(case, folder, engine, entry, saved, before)
        _region(case, entry, saved, after)
    compare_answer(case, "two_stage", greedy(engine, [after])[0], saved, entry["two_stage_ids"], 0)
    never = dataclasses.replace(request, options=dataclasses.replace(request.options, zoom="never"))
    plain = folder.once(
        lambda: greedy(engine, coarse_pass(engine, [never], clock_of(engine)))[0],
        "direct", entry["config"], entry["image"], entry["question"], request.options.sampling.max_new_tokens,
    )  # fmt: skip
    compare_answer(case, "direct", plain, saved, entry["direct_ids"], 0)
    case.require("every tensor compared", not saved.left, f"not compared: {saved.left}")


def _engine(folder: ModelFolder, entry: dict[str, Any]) -> Engine:
    """The checkpoint with what the release sets at run time: the way of the crops and the threshold."""
    engine = folder.engine(entry["config"])
    mask = entry["upscale_method"] == "mask"
    box = dataclasses.replace(
        engine.config.box, too_many="mask" if mask else "none", max_regions=1 if mask else 2, widen_to_edge=False
    )
    ratio = entry["roi2stage_max_ratio"]
    changed = engine.config.replace(
        box=box, region_threshold=entry["roi_conf_thresh"], tokens_per_cell=None if ratio == -1 else float(ratio)
    )
    return dataclasses.replace(engine, config=changed)


def _request(engine: Engine, folder: ModelFolder, entry: dict[str, Any], steps: int) -> Request:
    options = Options(sampling=SamplingParams(max_new_tokens=steps))
    return make_request(ChatEncoder(engine.backbone), folder.picture(entry["image"]), entry["question"], options)


def _ids(engine: Engine, ids: Tensor) -> Tensor:
    return ids.masked_fill(ids == engine.backbone.image_token_id, PICTURE)


def _prompt(case: Case, engine: Engine, entry: dict[str, Any], saved: Tensors, item: CoarseResult) -> None:
    prompt = item.state.prompt
    case.equal("input_ids", _ids(engine, torch.tensor(item.request.ids)), saved["input_ids"][0])
    case.equal("expanded_ids", _ids(engine, prompt.ids), saved["expanded_ids"][0])
    case.equal("position_ids", prompt.positions[0], saved["position_ids"][0])
    pieces = entry["text"].split("<image>")
    decoded = engine.backbone.tokenizer.decode(list(item.request.ids), skip_special_tokens=False)
    case.equal("text", [p.strip() for p in decoded.removeprefix("<s>").split("<image>")], [p.strip() for p in pieces])
    case.close("branch_hidden_last", item.state.hidden[len(prompt) - 1], saved["branch_hidden_last"][0], HIDDEN)
    if "branch_hidden" in saved:
        case.close("branch_hidden", item.state.hidden, saved["branch_hidden"], HIDDEN)


def _picture(case: Case, folder: ModelFolder, engine: Engine, entry: dict[str, Any], item: CoarseResult) -> None:
    name = Path(entry["image"]).stem
    saved, facts = Tensors(folder.tensors(f"images/{name}.safetensors")), folder.images[name]
    picture, features = item.request.pictures[0], item.state.prompt.spans[0].features
    case.equal("image size", list(picture.size_px), facts["size_wh"])
    case.equal("grid", list(features.grid), facts["grid_hw"])
    case.close("image features", features.tokens, saved["features"], HIDDEN)
    key = entry["config"], name
    pixels = folder.once(lambda: engine.backbone.pixels(picture.image, None)[0], "pixels", *key)
    if "vision" in saved:
        seen = folder.once(lambda: _seen(engine, pixels)[0], "vision", *key)
        case.close("image features before the projector", seen, saved["vision"], HIDDEN)
    count = pixels.numel()
    case.close("pixel sum per value", pixels.double().sum() / count, facts["pixel_sum"] / count, PIXEL)
    case.close("pixel sum per value", pixels.double().abs().sum() / count, facts["pixel_abs_sum"] / count, PIXEL)
    kept = folder.root / f"images/{name}.pixels.npz"
    if kept.exists():
        case.close("pixel_values", pixels, kept_pixels(kept), PIXEL)
    case.require("every picture tensor compared", not saved.left, f"not compared: {saved.left}")


@torch.no_grad()
def _seen(engine: Engine, pixels: Tensor) -> Tensor:
    """Hidden states before the projector, without the class token."""
    model = engine.backbone.model
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def _map(case: Case, engine: Engine, entry: dict[str, Any], saved: Tensors, item: CoarseResult) -> None:
    found, last = item.maps[0], item.state.region_last
    assert last is not None
    assert engine.region is not None
    single = engine.config.map_heads == "joined"
    case.close("twig_hidden_last", last, saved["twig_hidden_last"][0], HIDDEN)
    case.close("twig_normed_last", engine.region.normed(last), saved["twig_normed_last"][0], HIDDEN)
    for name, values in (("roi_logits", found.logits), ("prob", found.masked), ("blurred_prob", found.blurred)):
        allowed = SINGLE_HEAD[name] if single else 2 * MAP if name == "roi_logits" else MAP
        case.close(name + (" (one head)" if single else ""), values, saved[name], allowed)
    groups = connected_groups(found.blurred.numpy() > np.float32(entry["roi_conf_thresh"]))
    case.equal("groups", [[int(g.sum()), *bounds(g)] for g in groups], entry["groups_cells_xyxy"])
    boxes = [list(box) for group in groups if (box := group_cells(group, engine.config.box))]
    case.equal("boxes of groups", boxes, entry["roi_boxes_grid_xyxy"])
    case.equal("roi_boxes_grid", torch.tensor(boxes).view(-1, 4), saved["roi_boxes_grid"])


def _has_pixels(engine: Engine, request: Request, cells: Sequence[int]) -> bool:
    grid = engine.backbone.grid((1, 1), None)
    x0, y0, x1, y1 = cells_to_pixels(
        cells, grid, request.pictures[0].size_px, min_side_px=1, token_px=engine.backbone.token_px, padded=True
    )
    return x1 > x0 and y1 > y0


def _not_zoomed(item: CoarseResult) -> CoarseResult:
    return dataclasses.replace(item, gate=dataclasses.replace(item.gate, zoomed=False), boxes=())


def _recorded_boxes(entry: dict[str, Any], item: CoarseResult) -> list[MapBox]:
    keep = None
    if entry["way"] == "mask":
        ((x0, y0, x1, y1),) = entry["roi_box_grid_xyxy"]
        keep = item.maps[0].blurred.numpy()[y0:y1, x0:x1] > np.float32(entry["roi_conf_thresh"])
    pairs = zip(entry["roi_box_grid_xyxy"], entry["roi_box_pixel_xyxy"], strict=True)
    return [MapBox(0, tuple(cells), tuple(pixels), 0.0, keep) for cells, pixels in pairs]


def _as_recorded(engine: Engine, folder: ModelFolder, entry: dict[str, Any], item: CoarseResult) -> CoarseResult:
    """The recorded crops read, black ones included."""
    boxes = _recorded_boxes(entry, item)
    features = engine.backbone.encode([folder.picture(path) for path in entry["crops"]], [None] * len(boxes))
    blocks = [
        RegionBlock(0, box.cells, read_tokens(one, box, engine.config))
        for box, one in zip(boxes, features, strict=True)
    ]
    prompt, _ = insert_regions(engine.backbone, item.state.prompt, blocks, engine.config)
    with torch.no_grad():
        state = advance_shared(engine, [State.empty(engine, prompt)])[0]
    gate = dataclasses.replace(item.gate, zoomed=True)
    return dataclasses.replace(item, state=state, gate=gate, boxes=tuple(boxes))


def _crops(
    case: Case, folder: ModelFolder, engine: Engine, entry: dict[str, Any], saved: Tensors, item: CoarseResult
) -> None:
    """The pictures that the second pass sees, and what the encoder makes of them."""
    image = item.request.pictures[0].image
    boxes = _recorded_boxes(entry, item)
    case.equal("roi_box_grid", torch.tensor(entry["roi_box_grid_xyxy"]), saved["roi_box_grid"])
    case.equal("roi_box_pixel", torch.tensor(entry["roi_box_pixel_xyxy"]), saved["roi_box_pixel"])
    pixels = []
    for box, path in zip(boxes, entry["crops"], strict=True):
        crop = folder.picture(path)
        if box.box[2] > box.box[0] and box.box[3] > box.box[1]:
            case.equal("crop", np.asarray(engine.backbone.crop(image, box.box)), np.asarray(crop))
        pixels.append(engine.backbone.pixels(crop, None)[0])
        kept = folder.root / Path(path).with_suffix(".pixels.npz")
        if kept.exists():
            case.close("crop pixel_values", pixels[-1], kept_pixels(kept), PIXEL)
    if entry.get("crop_pixel_sum") is not None:
        every = torch.cat(pixels)
        total = every.double().sum() / every.numel()
        case.close("crop pixel sum per value", total, entry["crop_pixel_sum"] / every.numel(), PIXEL)
    keep = saved["roi_token_keep"].flatten().bool() if "roi_token_keep" in saved else None
    if "roi_features_vision" in saved:
        seen = _seen(engine, torch.cat(pixels))
        wanted = saved["roi_features_vision"]
        case.close("roi_features_vision", seen if keep is None else seen[:, keep].view(wanted.shape), wanted, HIDDEN)
    if keep is not None:
        marks = torch.arange(keep.numel(), dtype=torch.float32)[:, None]
        grid = engine.backbone.grid((1, 1), None)
        chosen = read_tokens(VisualFeatures(marks, (), grid, (1, 1)), boxes[0], engine.config).tokens[:, 0].long()
        case.equal("roi_token_keep", chosen, keep.nonzero()[:, 0])


def _region(case: Case, entry: dict[str, Any], saved: Tensors, item: CoarseResult) -> None:
    """What is inserted, and the sequence with it."""
    prompt = item.state.prompt
    spans = [span for span in prompt.spans if span.role == "region"]
    tokens = torch.cat([span.features.tokens for span in spans])
    case.equal("inserted tokens", len(tokens), entry["inserted_tokens"])
    case.close("roi_features", tokens, saved["roi_features"], HIDDEN)
    inserted = torch.zeros(len(prompt), dtype=torch.uint8)
    for span in spans:
        inserted[span.start : span.stop] = 1
    case.equal("inserted_mask", inserted, saved["inserted_mask"][0])
    ids = prompt.ids.clone()
    for span in prompt.spans:
        ids[span.start : span.stop] = PICTURE
    case.equal("updated_ids", ids, saved["updated_ids"][0])
    case.equal("updated_position_ids", prompt.positions[0], saved["updated_position_ids"][0])


def run_training_case(case: Case, folder: ModelFolder, name: str, entry: dict[str, Any]) -> None:
    """One recorded stage-1 loss with its gradients.

    Args:
        case: takes the errors.
        folder: the model.
        name: "stage1.*".
        entry: its record in training.json.
    """
    config = f"model/configs/{entry['variant']}.json"
    engine, settings = folder.engine(config), folder.read(config)
    saved = Tensors(folder.tensors(f"training/{name}.safetensors"))
    weights = trained_weights(engine, "stage1", entry["grad_l2_norms"])
    pictures = [folder.picture(path) for path in entry["images"]]
    with torch.no_grad():
        features = engine.backbone.encode(pictures, [None] * len(pictures))
    questions = [_training_prompt(case, engine, entry, saved, row, one) for row, one in enumerate(features)]
    loose = settings["roi_multi_head"] is False
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.no_grad():
            states = advance_shared(engine, [State.empty(engine, prompt) for prompt in questions])
        logits = [region_maps(engine, state)[0].logits for state in advance_region(engine, states)]
        targets = [target.view(logits[0].shape) for target in saved["roi_target_map"]]
        loss = region_loss(logits, targets, focal=settings["roi_loss"] == "focal")
        loss.backward()
        case.close("loss", loss.item(), saved["loss"].item(), 1e-4 if loose else 1e-5)
        compare_gradients(case, saved, entry, loss, weights, loss_tolerance=1e-4 if loose else 1e-5)
        norms = [w.grad.double().norm() for w in weights.values() if w.grad is not None]
        total = float(torch.stack(norms).norm()) if norms else 0.0
        case.close("global_grad_l2_norm", total, entry["global_grad_l2_norm"], ABSOLUTE, relative=RELATIVE)
        idle = [n.removeprefix("model.") for n in entry["trainable_without_gradient"] if not n.startswith("twig_head")]
        moved = [n for n in idle if weights[n].grad is not None and bool(weights[n].grad.any())]
        case.equal("weights without gradient", moved, [])
    finally:
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(False)
    case.require("every tensor compared", not saved.left, f"not compared: {saved.left}")


def _training_prompt(
    case: Case, engine: Engine, entry: dict[str, Any], saved: Tensors, row: int, features: VisualFeatures
) -> Prompt:
    """A sample up to the token that asks; question and answer give the recorded ids."""
    question, answer = entry["qa"][row]
    request = make_request(ChatEncoder(engine.backbone), folder_picture(), question, Options())
    length = int(saved["attention_mask"][row].sum())
    ids, labels = saved["input_ids"][row][:length], saved["labels"][row][:length]
    first = int((labels != IGNORE).nonzero()[0])
    case.equal("input_ids", _ids(engine, torch.tensor(request.ids)), ids[:first])
    backbone = engine.backbone
    ending = [*backbone.tokenizer(answer, add_special_tokens=False)["input_ids"], backbone.eos_ids[0]]
    case.equal("answer's ids", ending, ids[first:].tolist())
    case.equal("labels are the ids", labels[first:], ids[first:])
    return build_prompt(backbone, request.ids, [features])


def folder_picture() -> Any:
    """Some picture, where only the prompt's ids matter."""
    from PIL import Image

    return Image.new("RGB", (8, 8))


def run_labels(folder: Path, report: Report) -> None:
    """Label maps, map rows and box rows of a folder."""
    if (folder / "llava_stage1_labels.json").exists():
        _stage1_labels(folder, report)
    if (folder / "llava_map_to_boxes.json").exists():
        _map_rows(folder, report)
    if (folder / "llava_box_to_pixels.json").exists():
        for number, row in enumerate(_read(folder / "llava_box_to_pixels.json")):
            with report.case("box row", f"{folder.name}/padded box {number}") as case:
                size = tuple(row["image_size_wh"])
                grid = tuple(row["feature_hw"])
                ours = cells_to_pixels(row["box_grid_xyxy"], grid, size, min_side_px=1, token_px=14, padded=True)
                case.equal("box in pixels", list(ours), row["box_pixel_xyxy"])
                case.equal("in the padding", ours[0] == ours[2] or ours[1] == ours[3], row["empty"])


def _stage1_labels(folder: Path, report: Report) -> None:
    tensors = load_file(folder / "llava_stage1_labels.safetensors")
    used: set[str] = set()
    for pair in _read(folder / "llava_stage1_labels.json")["pairs"]:
        names = [f"{pair['index']:02d}.{kind}_attn" for kind in ("sink", "grounding")]
        sink, grounding = (tensors[name].numpy() for name in names)
        used |= {*names, *(f"{run['key']}.lazy_labels" for run in pair["runs"] if "lazy_bbox" in run)}
        for run in pair["runs"]:
            used.add(f"{run['key']}.labels")
            with report.case("stage-1 map", f"{folder.name}/{run['key']}") as case:
                given = run["settings"]
                settings = label_settings(given["sink_thresh"], given["binary_coff"], given["bg_coff"])
                ours = region_labels(sink, grounding, settings)
                case.equal("labels", ours.labels, tensors[f"{run['key']}.labels"].numpy())
                x0, y0, x1, y1 = ours.box
                case.equal("foreground box", [y0, x0, y1 - 1, x1 - 1], run["fg_bbox_rows_cols_inclusive"])
                case.equal("sinks", int((sink >= given["sink_thresh"]).sum()), run.get("sinks"))
                for name, value in (("fg", 1), ("bg", 0), ("ignored", IGNORE)):
                    case.equal(f"count of {name}", int((ours.labels == value).sum()), run[name])
    for name in sorted(set(tensors) - used):
        report.fail("unknown tensor", f"{folder.name}/{name}", "no run names it")


def label_settings(sink: float = 1e-3, foreground: float = 0.2, background: float = 0.1) -> LabelMapSettings:
    """The release's rules for LLaVA: no blur, no lower limit of the peak."""
    return LabelMapSettings(
        sink_threshold=sink, foreground=foreground, background=background, blur_cells=0, min_peak=0.0
    )


def _map_rows(folder: Path, report: Report) -> None:
    tensors = load_file(folder / "llava_map_to_boxes.safetensors")
    rows = _read(folder / "llava_map_to_boxes.json")
    for number, row in enumerate(rows):
        with report.case("map row", f"{folder.name}/{row['map']}, row {number}") as case:
            blurred = blur(tensors[f"{row['map']}.map"])
            case.close("blurred map", blurred, tensors[f"{row['map']}.blurred"], MAP)
            level = row["conf_thresh"]
            level = level if level >= 0 else -level * float(blurred.max())
            groups = connected_groups(blurred.numpy() > np.float32(level))
            case.equal("groups", [[int(g.sum()), *bounds(g)] for g in groups], row["groups_cells_xyxy"])
            boxes = [list(box) for group in groups if (box := group_cells(group, GROUPS))]
            case.equal("boxes of groups", boxes, row["boxes_xyxy"])
    for name in sorted(set(tensors) - {f"{row['map']}.{kind}" for row in rows for kind in ("map", "blurred")}):
        report.fail("unknown tensor", f"{folder.name}/{name}", "no row names it")


def run_attention(folder: Path, report: Report) -> set[Path]:
    """Labels from a tiny model's attention."""
    model = ModelFolder(folder)
    engine = model.engine("model/config.json")
    saved = Tensors(model.tensors("llava_attention.safetensors"))
    for entry in model.read("llava_attention.json")["items"]:
        with report.case("attention item", f"{folder.parent.name}/{entry['index']:02d}") as case:
            _attention_item(case, engine, model, entry, saved)
    if saved.left:
        report.fail("unknown tensor", folder.name, f"not compared: {saved.left}")
    return {*(folder / name for name in ATTENTION_FILES), *model_files(folder)}


def _attention_item(case: Case, engine: Engine, folder: ModelFolder, entry: dict[str, Any], saved: Tensors) -> None:
    backbone, key = engine.backbone, f"{entry['index']:02d}"
    options = Options(zoom="never")
    request = make_request(ChatEncoder(backbone), folder.picture(entry["image"]), entry["question"], options)
    case.equal("input_ids", _ids(engine, torch.tensor(request.ids)).tolist(), entry["input_ids"])
    item = coarse_pass(engine, [request], clock_of(engine))[0]
    cache = prefill(engine, [item], clock_of(engine))[0].cache
    seven = published_heads(backbone, 4096, 32, "text")
    thirteen = published_heads(backbone, 5120, 40, "text")
    assert seven is not None
    assert thirteen is not None
    layers = sorted({layer for heads in (seven, thirteen) for layer, _ in (*heads.pointing, *heads.sinks)})
    with torch.no_grad():
        found = response_attention(backbone, item.state.prompt, cache, entry["generated_ids"][:-1], layers)[0]
    heads = torch.stack([found.mean_of([(14, head)]) for head in (24, 13, 26)])
    sink, grounding = found.mean_of(seven.sinks), found.mean_of(seven.pointing)
    near = saved[f"{key}.near"].bool()
    _attention(case, "heads", heads, saved[f"{key}.heads_24_13_26"])
    _attention(case, "sinks", sink, saved[f"{key}.sink_attn"])
    kept = torch.where(near | (sink >= 1e-3), torch.zeros(()), grounding)
    recorded = saved[f"{key}.grounding_attn"]
    _attention(case, "grounding", kept, torch.where(near, torch.zeros((), dtype=recorded.dtype), recorded))
    case.close("count of sinks", int((sink >= 1e-3).sum()), entry["sinks"], float(near.sum()))
    ours = region_labels(sink.numpy(), grounding.numpy(), label_settings())
    x0, y0, x1, y1 = ours.box
    same_box = [y0, x0, y1 - 1, x1 - 1] == entry["fg_bbox_rows_cols_inclusive"]
    labels = saved[f"{key}.labels"]
    case.require("same box", same_box or bool(near.any()), f"{ours.box}")
    if same_box:
        case.equal("labels", torch.as_tensor(ours.labels)[~near], labels[~near])
    if entry["index"] == 0:
        _thirteen(case, found, thirteen.pointing, thirteen.sinks, saved)


def _thirteen(case: Case, found: ResponseAttention, pointing: Any, sinks: Any, saved: Tensors) -> None:
    """The larger model's choice of heads, whose script stops in the release; the recorder did its sum."""
    for name, heads in (("grounding", pointing), ("sink", sinks)):
        _attention(case, f"{name}, 13B's heads", found.mean_of(heads), saved[f"thirteen_b.{name}_attn"])


def _attention(case: Case, name: str, ours: Tensor, recorded: Tensor) -> None:
    case.close(f"attention of {name}", ours, recorded.double(), 1e-6, relative=2e-3)


def model_files(folder: Path) -> set[Path]:
    """What belongs to a model folder beside its cases."""
    return {path for name in ("model", "processor", "vision_tower") for path in (folder / name).rglob("*")}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
