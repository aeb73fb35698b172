"""Stage-1 maps, known-background masks, box rows, trajectories, normalise pairs and filter orders of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from qzoom.data.cells import picture_in_square
from qzoom.heads.boxes import cells_to_pixels
from qzoom.labels.gate import categorise, draw_label, label_outcomes, select_items
from qzoom.labels.maps import region_labels
from qzoom.labels.settings import LabelMapSettings
from qzoom.scoring.agree import normalise_answer
from qzoom.store.schema import ResolutionSweep
from tests.parity.report import EXACT, Case, Report

FILES = ("box_to_pixels.json", "stage1_labels.json", "stage1_labels.safetensors", "stage3_labels.json")
STRATEGIES = {"default": "consistency", "prediction_vs_gt": "prediction_vs_gt"}
PROBABILITY = 1e-6  # recorded with six digits


def run_labels(folder: Path, report: Report) -> None:
    """Run all label cases of a folder."""
    if (folder / "stage1_labels.json").exists():
        _stage1(folder, report)
    if (folder / "box_to_pixels.json").exists():
        _boxes(folder, report)
    if (folder / "stage3_labels.json").exists():
        _stage3(folder, report)


def _stage1(folder: Path, report: Report) -> None:
    recorded = _read(folder / "stage1_labels.json")
    tensors = load_file(folder / "stage1_labels.safetensors")
    used: set[str] = set()
    for triple in recorded["triples"]:
        index = f"{triple['index']:02d}"
        sink, grounding = tensors[f"{index}.sink_attn"], tensors[f"{index}.grounding_attn"]
        used |= {f"{index}.sink_attn", f"{index}.grounding_attn"}
        for run in triple["runs"]:
            used.add(f"{run['key']}.labels")
            with report.case("stage-1 map", f"{folder.name}/{run['key']}") as case:
                _stage1_run(case, run, triple, sink, grounding, tensors[f"{run['key']}.labels"])
    for name in sorted(set(tensors) - used):
        report.fail("unknown tensor", f"{folder.name}/{name}", "no run names it")
    for mask in recorded["known_background_masks"]:
        size = tuple(mask["image_size_wh"])
        with report.case("known-background mask", f"{folder.name}/{size[0]}x{size[1]} on {mask['target']}") as case:
            x0, y0, x1, y1 = picture_in_square(size, mask["target"])
            case.equal("rows and columns", [y0, x0, y1 - 1, x1 - 1], mask["bbox_rows_cols_inclusive"])
            case.equal("cells", (x1 - x0) * (y1 - y0), mask["count"])


def _stage1_run(
    case: Case, run: dict[str, Any], triple: dict[str, Any], sink: np.ndarray, grounding: np.ndarray, labels: np.ndarray
) -> None:
    given = run["settings"]
    settings = LabelMapSettings(
        sink_threshold=given["sink_thresh"],
        foreground=given["binary_coff"],
        background=given["bg_coff"],
        blur_cells=given["pseudo_blur_kernel_size"],
    )
    padded = tuple(triple["image_size_wh"]) if run["mask_known_bg"] else None
    ours = region_labels(sink, grounding, settings, padded_from_px=padded)
    case.equal("labels", ours.labels, labels)
    case.equal("dtype", str(ours.labels.dtype), str(labels.dtype))
    x0, y0, x1, y1 = ours.box
    case.equal("foreground box", [y0, x0, y1 - 1, x1 - 1], run["fg_bbox_rows_cols_inclusive"])
    for name, value in (("fg", 1), ("bg", 0), ("ignored", -100)):
        case.equal(f"count of {name}", int((ours.labels == value).sum()), run[name])


def _boxes(folder: Path, report: Report) -> None:
    for number, row in enumerate(_read(folder / "box_to_pixels.json")):
        with report.case("box row", f"{folder.name}/box {number}") as case:
            ours = cells_to_pixels(
                row["box_grid_xyxy"],
                tuple(row["feature_hw"]),
                tuple(row["image_size_wh"]),
                min_side_px=row.get("min_side", 28),
                scaling="float32",
                token_px=row["merged_patch"],
            )
            case.equal("box in pixels", list(ours), row["box_pixel_xyxy"])


def _stage3(folder: Path, report: Report) -> None:
    recorded = _read(folder / "stage3_labels.json")
    trajectories = [
        ResolutionSweep("", 0, tuple(item["res"]), tuple(item["ms_answers"]), item["text"])
        for item in recorded["trajectories"]
    ]
    for item, trajectory in zip(recorded["trajectories"], trajectories, strict=True):
        with report.case("trajectory", f"{folder.name}/{item['index']}") as case:
            case.equal("category", categorise(trajectory), item["category"])
            for name, outcomes in item["outcomes"].items():
                _outcomes(case, trajectory, name, outcomes)
    for before, after in recorded["normalise"]:
        with report.case("normalise pair", f"{folder.name}/{before!r}") as case:
            case.equal("normalised", normalise_answer(before), after)
    for seed, order in recorded["filtered_order_by_python_random_seed"].items():
        with report.case("filter order", f"{folder.name}/seed {seed}") as case:
            case.equal("order", select_items(trajectories, int(seed)), order)


def _outcomes(case: Case, trajectory: ResolutionSweep, name: str, recorded: list[dict[str, Any]]) -> None:
    """Equal distributions; where the release raises, ours must leave the sample out instead of labelling it."""
    import random

    ours = label_outcomes(trajectory, STRATEGIES[name])
    case.close("sum of probabilities", sum(ours.values()), 1.0, 1e-12)
    rng = random.Random(0)
    possible = set(ours)
    draws = {draw_label(trajectory, rng, STRATEGIES[name]) for _ in range(20)}
    case.require("draws are possible outcomes", draws <= possible, f"{draws - possible}")
    if any("error" in outcome for outcome in recorded):
        left_out = possible == {(-100, trajectory.tokens[0])}
        case.require("left out where the release raises", left_out, f"{ours}")
        return
    theirs = {(o["label"], o["resolution_tokens"]): o["probability"] for o in recorded}
    case.equal(f"outcomes ({name})", sorted(possible), sorted(theirs))
    keys = sorted(possible | set(theirs))
    found, expected = ([shares.get(k, EXACT) for k in keys] for shares in (ours, theirs))
    case.close(f"probabilities ({name})", found, expected, PROBABILITY)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
