"""One question through the engine, every recorded step compared: prompt, gate, map, box, region, logits, ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import DecodeBatch, prefill
from qzoom.engine.perceive import CoarseResult, Stopwatch
from qzoom.engine.request import Options, Request, make_request
from qzoom.engine.state import Engine, advance_gate
from qzoom.engine.zoom import zoom
from qzoom.heads.boxes import MapBox, boxes_from_maps
from qzoom.heads.region_map import blur
from qzoom.types import SamplingParams
from tests.parity.model_folder import ModelFolder
from tests.parity.report import EXACT, Case

MAP, HIDDEN, LOGITS, BATCH, POSITION = 1e-5, 1e-4, 2e-4, 1e-4, 1e-5  # absolute, float32
PIXEL = 1e-5


class Tensors:
    """A case's recorded tensors; remembers which were compared."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        self._used.add(name)
        return self._tensors[name]

    @property
    def left(self) -> list[str]:
        """Names that nothing was compared with."""
        return sorted(set(self._tensors) - self._used)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Logits (steps, vocabulary) and ids (steps,) of one greedy answer."""

    logits: Tensor
    ids: Tensor


def run_single_case(case: Case, folder: ModelFolder, entry: dict[str, Any]) -> None:
    """A case of one question."""
    engine = folder.engine(entry["config"])
    saved = Tensors(folder.tensors(f"cases/{entry['id']}.safetensors"))
    steps = saved["two_stage_ids"].shape[1]
    request = _request(engine, folder, entry["image"], entry["messages"], entry, steps)
    before = coarse_pass(engine, [request], clock_of(engine))[0]
    after = zoom(engine, [before], clock_of(engine))[0][0]
    _coarse(case, folder, engine, entry, saved, before, row=0)
    gated = saved["gate_score"][0].item() < entry["high_res_thresh"] if "gate_score" in saved else False
    case.equal("zoomed", before.gate.zoomed, bool(entry["zoomed"]))
    if not gated:
        _maps(case, saved, before, "", row=0)
        case.equal("sinks", _sinks(before), entry.get("sinks"))
    _boxes(case, engine, entry, before)
    if before.boxes:
        _region(case, engine, saved, after, "", row=0)
        _crop(case, folder, engine, entry, before)
    tokens = sum(s.stop - s.start for s in after.state.prompt.spans)
    case.equal("visual tokens", tokens, entry.get("visual_token_num_reported", tokens))
    compare_answer(case, "two_stage", greedy(engine, [after])[0], saved, entry["two_stage_ids"], row=0)
    plain = folder.once(
        lambda: _direct(engine, [request])[0], "direct", entry["config"], entry["image"], str(entry["messages"]), steps
    )
    compare_answer(case, "direct", plain, saved, entry["direct_ids"], row=0)
    case.require("every tensor compared", not saved.left, f"not compared: {saved.left}")


def run_batch_case(case: Case, folder: ModelFolder, entry: dict[str, Any]) -> None:
    """A batch, sample by sample.

    The release's gate zooms all samples or none and one sample's sink mask serves all; ours decide alone. So the run
    as we do it is compared with single runs and, by what each gate says, with the recorded zoomed or direct answer;
    the recorded zoom itself is compared with every sample's recorded box put in.
    """
    engine = folder.engine(entry["config"])
    saved = Tensors(folder.tensors(f"cases/{entry['id']}.safetensors"))
    steps = saved["two_stage_ids"].shape[1]
    requests = [
        _request(engine, folder, image, messages, entry, steps)
        for image, messages in zip(entry["images"], entry["messages"], strict=True)
    ]
    count = len(requests)
    together = coarse_pass(engine, requests, clock_of(engine), everyone=True)
    alone = [coarse_pass(engine, [request], clock_of(engine))[0] for request in requests]
    forced = []
    for row, item in enumerate(together):
        _coarse(case, folder, engine, entry, saved, item, row)
        keep = saved["sink_keep"] if "sink_keep" in saved else together[_mask_row(engine, count)].maps[0].keep
        _batch_maps(case, saved, item, keep, row, is_mask_row=row == _mask_row(engine, count))
        forced.append(_with_box(engine, item, saved, entry, row, case))
        case.equal("zoomed, alone and together", item.gate.zoomed, alone[row].gate.zoomed)
    zoomed = zoom(engine, forced, clock_of(engine))[0]
    as_recorded = greedy(engine, zoomed)
    ours = greedy(engine, zoom(engine, together, clock_of(engine))[0])
    plain = _direct(engine, requests)
    for row in range(count):
        _region(case, engine, saved, zoomed[row], f".{row}", row)
        if bool(saved["updated_attention_mask"][row].all()):
            compare_answer(case, "two_stage", as_recorded[row], saved, entry["two_stage_ids"][row], row)
        else:  # the release reads a padded row's answer from its padding, so the row alone is what counts
            _close_answer(case, "padded row: alone", as_recorded[row], greedy(engine, [zoomed[row]])[0])
        compare_answer(case, "direct", plain[row], saved, entry["direct_ids"][row], row)
        single = greedy(engine, zoom(engine, [alone[row]], clock_of(engine))[0])[0]
        case.close("batch and single logits", ours[row].logits, single.logits, BATCH)
        case.equal("batch and single ids", ours[row].ids.tolist(), single.ids.tolist())
        if not together[row].gate.zoomed:
            _close_answer(case, "below the gate: direct", ours[row], plain[row])
        elif together[row].boxes[0].box == forced[row].boxes[0].box:
            _close_answer(case, "above the gate: zoomed", ours[row], as_recorded[row])
    case.equal("gate decisions", [item.gate.zoomed for item in together], _decisions(saved, entry))
    case.require("every tensor compared", not saved.left, f"not compared: {saved.left}")


def greedy(engine: Engine, looks: Sequence[CoarseResult]) -> list[Answered]:
    """Greedy answers of looks whose regions have been read, the end token switched off."""
    rows = prefill(engine, looks, clock_of(engine))
    logits: list[list[Tensor]] = [[row.logits] for row in rows]
    batch = DecodeBatch(engine.backbone, eos_ids=())
    batch.start(rows)
    while batch.rows:
        for row, _ in batch.step():
            logits[row.key].append(row.logits)
    return [Answered(torch.stack(logits[row.key]), torch.tensor(row.tokens)) for row in rows]


def grid_thw(engine: Engine, features: VisualFeatures) -> Tensor:
    """The grid as it is recorded: time, height and width in unmerged patches."""
    merge = engine.backbone.model.config.vision_config.spatial_merge_size
    return torch.tensor([1, features.grid[0] * merge, features.grid[1] * merge])


def clock_of(engine: Engine) -> Stopwatch:
    return Stopwatch(engine.backbone.device)


def _request(
    engine: Engine, folder: ModelFolder, image: str, messages: Any, entry: dict[str, Any], steps: int
) -> Request:
    options = Options(
        sampling=SamplingParams(max_new_tokens=steps),
        gate_threshold=_probability(entry.get("high_res_thresh")),
        region_threshold=_probability(entry.get("roi_conf_thresh")),
    )
    return make_request(ChatEncoder(engine.backbone), folder.root / image, messages, options)


def _probability(threshold: float | None) -> float | None:
    """Thresholds above 1 mean "never", as 1 does for the probabilities compared here."""
    return None if threshold is None else min(float(threshold), 1.0)


def _direct(engine: Engine, requests: Sequence[Request]) -> list[Answered]:
    plain = [dataclasses.replace(r, options=dataclasses.replace(r.options, zoom="never")) for r in requests]
    return greedy(engine, coarse_pass(engine, plain, clock_of(engine)))


def _coarse(
    case: Case, folder: ModelFolder, engine: Engine, entry: dict[str, Any], saved: Tensors, item: CoarseResult, row: int
) -> None:
    """Prompt, picture, shared layers and gate of one sample."""
    prompt = item.state.prompt
    valid = saved["attention_mask"][row].bool()
    case.equal("input_ids", prompt.ids, saved["input_ids"][row][valid])
    case.equal("position_ids", prompt.positions, saved["position_ids"][:, row, valid])
    features = prompt.spans[0].features
    case.equal("image_grid_thw", grid_thw(engine, features), saved["image_grid_thw"][row])
    if "grid_hw_merged" in entry:
        case.equal("merged grid", list(features.grid), entry["grid_hw_merged"])
    text = entry["texts_expanded"][row] if "texts_expanded" in entry else entry["text_expanded"]
    case.equal("expanded text", engine.backbone.tokenizer.decode(prompt.ids.tolist()), text)
    image = entry["images"][row] if "images" in entry else entry["image"]
    _picture(case, folder, engine, entry["config"], image, item)
    case.close("branch_hidden_last", item.state.hidden[len(prompt) - 1], saved["branch_hidden_last"][row], HIDDEN)
    if "gate_score" not in saved:
        return
    fresh = dataclasses.replace(item.state, gate=type(item.state.gate)())
    hidden = advance_gate(engine, [fresh])[1][0]
    case.close("gate_hidden_last", hidden, saved["gate_hidden_last"][row], HIDDEN)
    case.close("gate_score", item.gate.score, saved["gate_score"][row].item(), MAP)
    listed = entry["gate_scores"][row] if "gate_scores" in entry else entry["gate_score"]
    case.close("gate_score", item.gate.score, listed, MAP)


def _picture(case: Case, folder: ModelFolder, engine: Engine, config: str, image: str, item: CoarseResult) -> None:
    """Vision features, and pixel values where they were kept."""
    name = Path(image).stem
    saved = Tensors(folder.tensors(f"images/{name}.safetensors"))
    facts = folder.images[name]
    features = item.state.prompt.spans[0].features
    case.equal("image size", list(item.request.pictures[0].size_px), facts["size_wh"])
    case.equal("image_grid_thw", grid_thw(engine, features), saved["image_grid_thw"].reshape(-1))
    case.equal("image_grid_thw", grid_thw(engine, features).tolist(), facts["grid_thw"])
    case.close("vision features", features.tokens, saved["features"], HIDDEN)
    case.equal("DeepStack levels", len(features.deepstack), sum(n.startswith("deepstack") for n in saved._tensors))
    for level, values in enumerate(features.deepstack):
        case.close("DeepStack features", values, saved[f"deepstack.{level}"], HIDDEN)
    pixels = folder.once(lambda: _pixels(engine, item.request.pictures[0].image), "pixels", config, image)
    case.close("pixel sum per value", pixels.sum() / pixels.size, facts["pixel_sum"] / pixels.size, PIXEL)
    case.close("pixel sum per value", np.abs(pixels).sum() / pixels.size, facts["pixel_abs_sum"] / pixels.size, PIXEL)
    if (folder.root / f"images/{name}.pixels.npz").exists():
        case.close("pixel_values", pixels, kept_pixels(folder.root / f"images/{name}.pixels.npz"), PIXEL)
    case.require("every picture tensor compared", not saved.left, f"not compared: {saved.left}")


def _pixels(engine: Engine, image: Any) -> np.ndarray:
    return engine.backbone.pixels(image, None)[0].double().numpy()


def kept_pixels(path: Path) -> np.ndarray:
    with np.load(path) as kept:
        return kept["pixel_values"] if "pixel_values" in kept.files else kept[kept.files[0]]


def _maps(case: Case, saved: Tensors, item: CoarseResult, suffix: str, row: int) -> None:
    """The region branch's steps of one sample that is alone."""
    found = item.maps[0]
    case.close("twig_hidden_last", item.state.region_last, saved["twig_hidden_last"][row], HIDDEN)
    case.close("roi_logits", found.logits, saved["roi_logits" + suffix], MAP)
    if "sink_prob" in saved:
        case.require("sink map", found.sink_prob is not None, "none was made")
        case.close("sink_prob", found.sink_prob, saved["sink_prob"], MAP)
        case.equal("sink_keep", found.keep.to(torch.uint8), saved["sink_keep"])
    case.close("masked_prob", found.masked, saved["masked_prob" + suffix], MAP)
    case.close("blurred_prob", found.blurred, saved["blurred_prob" + suffix], MAP)


def _batch_maps(case: Case, saved: Tensors, item: CoarseResult, keep: Tensor, row: int, *, is_mask_row: bool) -> None:
    """The same in a batch, where the release gives every sample the mask of one of them."""
    found = item.maps[0]
    case.close("twig_hidden_last", item.state.region_last, saved["twig_hidden_last"][row], HIDDEN)
    case.close("roi_logits", found.logits, saved[f"roi_logits.{row}"], MAP)
    if is_mask_row:
        if "sink_prob" in saved:
            case.close("sink_prob", found.sink_prob, saved["sink_prob"], MAP)
        case.equal("sink_keep", found.keep, keep.to(found.keep.dtype))
        case.close("masked_prob", found.masked, saved[f"masked_prob.{row}"], MAP)
        case.close("blurred_prob", found.blurred, saved[f"blurred_prob.{row}"], MAP)
        return
    masked = found.logits.sigmoid() * keep.to(found.logits.dtype)
    case.close("masked_prob", masked, saved[f"masked_prob.{row}"], MAP)
    case.close("blurred_prob", blur(masked), saved[f"blurred_prob.{row}"], MAP)


def _mask_row(engine: Engine, count: int) -> int:
    """Whose mask the release uses for a whole batch: the last sample's sinks, or the first one's corners."""
    return count - 1 if engine.config.sink == "first_token" else 0


def _with_box(
    engine: Engine, item: CoarseResult, saved: Tensors, entry: dict[str, Any], row: int, case: Case
) -> CoarseResult:
    """The look with the recorded box, which our box rule must also draw on the recorded map."""
    cells = tuple(saved[f"roi_box_grid.{row}"].tolist())
    pixels = tuple(saved[f"roi_box_pixel.{row}"].tolist())
    drawn = boxes_from_maps(
        [saved[f"blurred_prob.{row}"]],
        [p.size_px for p in item.request.pictures],
        threshold=entry["roi_conf_thresh"],
        rule=engine.config.box,
        token_px=engine.backbone.token_px,
    )
    case.equal("roi_box_grid", tuple(drawn[0].cells), cells)
    case.equal("roi_box_pixel", tuple(drawn[0].box), pixels)
    gate = dataclasses.replace(item.gate, zoomed=True)
    return dataclasses.replace(item, gate=gate, boxes=(MapBox(0, cells, pixels, drawn[0].score),))


def _boxes(case: Case, engine: Engine, entry: dict[str, Any], item: CoarseResult) -> None:
    cells = [list(box.cells) for box in item.boxes]
    pixels = [list(box.box) for box in item.boxes]
    case.equal("roi_box_grid", cells, [entry["roi_box_grid_xyxy"]] if entry.get("roi_box_grid_xyxy") else [])
    case.equal("roi_box_pixel", pixels, [entry["roi_box_pixel_xyxy"]] if entry.get("roi_box_pixel_xyxy") else [])


def _sinks(item: CoarseResult) -> int | None:
    found = item.maps[0]
    return None if found.sink_prob is None else int((found.keep == 0).sum())


def _region(case: Case, engine: Engine, saved: Tensors, item: CoarseResult, suffix: str, row: int) -> None:
    """What was read at high resolution, and the sequence with it."""
    prompt = item.state.prompt
    spans = [span for span in prompt.spans if span.role == "region"]
    case.equal("regions read", len(spans), 1)
    features = spans[0].features
    case.equal("roi_box_grid", torch.tensor(item.boxes[0].cells).long(), saved["roi_box_grid" + suffix])
    case.equal("roi_box_pixel", torch.tensor(item.boxes[0].box), saved["roi_box_pixel" + suffix])
    case.equal("roi_grid_thw", grid_thw(engine, features), saved["roi_grid_thw" + suffix].reshape(-1))
    case.close("roi_features", features.tokens, saved["roi_features" + suffix], HIDDEN)
    for level, values in enumerate(features.deepstack):
        case.close("roi_deepstack", values, saved[f"roi_deepstack{suffix}.{level}"], HIDDEN)
    valid = saved["updated_attention_mask"][row].bool()
    case.equal("updated_input_ids", prompt.ids, saved["updated_input_ids"][row][valid])
    positions = saved["updated_position_ids"][:, row, valid]
    exact = not positions.is_floating_point()
    name = "updated_position_ids" if exact else "updated_position_ids (fractional)"
    case.close(name, prompt.positions, positions, EXACT if exact else POSITION)
    inserted = torch.zeros(len(prompt), dtype=torch.uint8)
    opening, closing = engine.backbone.image_delimiters
    inserted[spans[0].start - len(opening) : spans[0].stop + len(closing)] = 1
    case.equal("inserted_mask", inserted, saved["inserted_mask"][row][valid])


def _crop(case: Case, folder: ModelFolder, engine: Engine, entry: dict[str, Any], item: CoarseResult) -> None:
    """The picture that the second look sees."""
    if not entry.get("crop"):
        return
    ours = item.request.pictures[0].image.crop(item.boxes[0].box)
    case.equal("crop", np.asarray(ours), np.asarray(folder.picture(entry["crop"])))
    pixels = _pixels(engine, ours)
    case.close("crop pixel sum per value", pixels.sum() / pixels.size, entry["crop_pixel_sum"] / pixels.size, PIXEL)
    kept = folder.root / Path(entry["crop"]).with_suffix(".pixels.npz")
    if kept.exists():
        case.close("crop pixel_values", pixels, kept_pixels(kept), PIXEL)


def compare_answer(case: Case, name: str, ours: Answered, saved: Tensors, listed: list[int], row: int) -> None:
    case.equal(f"{name}_ids", ours.ids, saved[f"{name}_ids"][row])
    case.equal(f"{name}_ids", ours.ids.tolist(), listed)
    case.close(f"{name}_logits", ours.logits, saved[f"{name}_logits"][row], LOGITS)


def _close_answer(case: Case, name: str, ours: Answered, other: Answered) -> None:
    case.close(f"{name}, logits", ours.logits, other.logits, BATCH)
    case.equal(f"{name}, ids", ours.ids.tolist(), other.ids.tolist())


def _decisions(saved: Tensors, entry: dict[str, Any]) -> list[bool]:
    if "gate_score" not in saved:
        return [True] * len(entry["images"])
    return [score >= entry["high_res_thresh"] for score in saved["gate_score"].tolist()]
