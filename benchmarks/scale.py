"""Time plain and zoomed answers at a published model's sizes, with random weights.

Random weights: speed only, never accuracy. What a zoomed question costs, and one that the coarse look settles, is timed
with the gate forced to yes and to no; the mean of the two is weighted with the share of questions that the embedded
model zooms at equal accuracy (docs/results/ladder.json). Every time stands beside the ratio of operations, so the page
says how much of what arithmetic promises is reached.

Usage: python -m benchmarks.scale --config CONFIG.json [--layers N] [--only CASE ...] [--device cuda]
       python -m benchmarks.scale --report
`CONFIG.json` is the `config.json` of a Qwen3-VL checkpoint (transformers 4.57 or 5 field names). Every case that is
measured is a line of `--store`; a rerun measures what is missing. `--layers N` builds a decoder of N layers, with as
large a part of the vision encoder, of K and of T. `--report` writes docs/results/scale.md and .json: a case that was
not measured at the full depth is extended from two smaller depths along a straight line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from PIL import Image

from benchmarks.engine import FIRST, machine
from qzoom.config import TokenBudget, ZoomConfig
from qzoom.engine.state import Engine
from qzoom.evaluation.flops import answer_flops, shape_of
from qzoom.evaluation.tables import markdown_table
from qzoom.heads.branches import new_gate, new_region
from qzoom.model import QZoom
from qzoom.types import Answer

PLAIN = (1024, 4096)
ZOOM = ((144, 144), (64, 144))
RESULTS = Path(__file__).parent.parent / "docs" / "results"
LADDER = RESULTS / "ladder.json"


def depths(path: Path, layers: int) -> dict[str, Any]:
    """The settings of the configured model cut to so many decoder layers (0: all), and K and T for them."""
    values = json.loads(path.read_text())
    text, vision = values["text_config"], values["vision_config"]
    whole = text["num_hidden_layers"]
    layers = layers or whole
    depth = max(1, vision["depth"] * layers // whole)
    levels = [max(0, (at + 1) * depth // vision["depth"] - 1) for at in vision["deepstack_visual_indexes"]]
    text["num_hidden_layers"] = layers
    vision |= {"depth": depth, "deepstack_visual_indexes": levels}
    settings = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    return {"settings": settings, "layers": layers, "of": whole, "K": 2 * layers // 3, "T": max(1, layers // 12)}


def build_model(made: dict[str, Any], dtype: torch.dtype, device: str) -> QZoom:
    """A model of the settings from `depths`, weights uniform in +-0.02."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from qzoom.backbones.registry import build_backbone
    from tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([FIRST], 400)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{text}|>")
        for name, text in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen3VLConfig(**made["settings"] | ids)
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model = _fill(model, device)
    model.generation_config.eos_token_id = config.text_config.vocab_size + 1  # never drawn: full-length answers
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    backbone = build_backbone(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size))
    heads = (part(backbone, made["K"], made["T"]).eval().requires_grad_(False) for part in (new_gate, new_region))
    zoom = ZoomConfig(shared_layers=made["K"], branch_layers=made["T"])
    return QZoom(Engine(backbone, *heads, config=zoom), "random")


def _fill(model: Any, device: str) -> Any:
    """Memory for all parameters, with a few million random values again and again, since drawing billions takes long.

    The buffers (rotary frequencies) are computed again.
    """
    model.to_empty(device=device)
    model.tie_weights()
    noise = torch.empty(2**22, dtype=torch.float32, device=device).uniform_(-0.02, 0.02)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
                continue
            for piece in weight.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
    for module in model.modules():
        inverse = getattr(module, "inv_freq", None)
        if inverse is None:
            continue
        if hasattr(module, "compute_default_rope_parameters"):
            values, _ = module.compute_default_rope_parameters(module.config, device=inverse.device)
        else:
            steps = torch.arange(0, 2 * len(inverse), 2, dtype=torch.float32, device=inverse.device)
            values = 1.0 / (10000.0 ** (steps / (2 * len(inverse))))
        module.register_buffer("inv_freq", values, persistent=False)
        if hasattr(module, "original_inv_freq"):
            module.original_inv_freq = values
    model.tie_weights()
    return model.eval().requires_grad_(False)


def cases(model: QZoom, tokens: int) -> dict[str, Callable[[], Answer]]:
    """Everything that is timed: the plain look at each cap; each pair of budgets with the gate at no and at yes."""
    side = round(max(PLAIN) ** 0.5) * 32
    page = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))

    def ask(coarse: int, **options: Any) -> Callable[[], Answer]:
        budget = TokenBudget(coarse, coarse)
        return lambda: model.ask(page, FIRST, coarse_tokens=budget, max_new_tokens=tokens, **options)

    out = {f"plain {cap}": ask(cap, zoom="never") for cap in PLAIN}
    for coarse, region in ZOOM:
        name = f"{coarse} + {region}"
        out[f"{name}, no zoom"] = ask(coarse, gate_threshold=1.0)
        size = TokenBudget(region, region)
        out[f"{name}, zoomed"] = ask(coarse, gate_threshold=0.0, region_threshold=0.0, region_tokens=size)
    return out


def warm(model: QZoom) -> Callable[[], Answer]:
    """A small question that loads what loads once."""
    return lambda: model.ask(Image.new("RGB", (128, 128)), FIRST, zoom="never", max_new_tokens=2)


def measure(name: str, work: Callable[[], Answer], repeats: int, device: str, clock: str) -> dict[str, Any]:
    """The least seconds of a case over some repetitions; "cpu" takes the processor's time, not the wall clock's."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    least = math.inf
    gc.collect()
    for _ in range(repeats):
        _wait(device)
        start = now()
        answer = work()
        _wait(device)
        least = min(least, now() - start)
    zooms = name.endswith(", zoomed")
    if answer.gate.zoomed != zooms:
        raise RuntimeError(f"{name}: the answer zoomed is {answer.gate.zoomed}.")
    return {"case": name, "seconds": round(least, 4), "clock": clock, "answer": answer}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def operations(model: QZoom, answer: Answer) -> int:
    """Operations of an answer from the model's sizes."""
    region = answer.usage.region_tokens
    return answer_flops(
        shape_of(model.engine),
        coarse_tokens=answer.usage.coarse_tokens,
        region_tokens=region,
        prompt_tokens=answer.usage.prompt_tokens,
        completion_tokens=answer.usage.completion_tokens,
        gate=answer.gate.score is not None,
        region_branch=bool(region),
    )


def compare(seconds: dict[str, float], flops: dict[str, float], shares: dict[str, float]) -> list[dict[str, Any]]:
    """One row per kind of picture, pair and cap: speed-up, ratio of operations and the part of it that is reached."""
    rows = []
    for kind, share in shares.items():
        for coarse, region in ZOOM:
            name = f"{coarse} + {region}"
            mean = {
                what: (1 - share) * values[f"{name}, no zoom"] + share * values[f"{name}, zoomed"]
                for what, values in (("seconds", seconds), ("flops", flops))
            }
            for cap in PLAIN:
                faster = seconds[f"plain {cap}"] / mean["seconds"]
                less = flops[f"plain {cap}"] / mean["flops"]
                rows.append(
                    {"kind": kind, "share": share, "pair": name, "cap": cap}
                    | {"faster": round(faster, 3), "operations": round(less, 3), "reached": round(faster / less, 3)}
                )
    return rows


def zoom_shares() -> dict[str, float]:
    """Share of zoomed questions of scenes and documents, at the caps where accuracy equals the plain peak."""
    kinds = json.loads(LADDER.read_text())["kinds"]
    return {
        kind: round(next(p["zoomed"] for p in kinds[kind]["zoom"] if p["cap"] == kinds[kind]["match"]["cap"]), 4)
        for kind in ("scenes", "documents")
    }


def at_depth(lines: list[dict[str, Any]], name: str, field: str, whole: int) -> tuple[float, bool] | None:
    """A case's figure at the full depth, and whether it was measured there; else extended from two depths."""
    own = {line["layers"]: line[field] for line in lines if line["case"] == name}
    if whole in own:
        return own[whole], True
    if len(own) < 2:
        return None
    low, high = sorted(own)[-2:]
    slope = (own[high] - own[low]) / (high - low)
    return own[high] + slope * (whole - high), False


def report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of everything measured."""
    whole = lines[-1]["of"]
    found = {}
    for name in dict.fromkeys(line["case"] for line in lines):
        time_of, work = (at_depth(lines, name, field, whole) for field in ("seconds", "tflops"))
        if time_of is not None and work is not None:
            found[name] = {"seconds": round(time_of[0], 3), "tflops": round(work[0], 3), "measured": time_of[1]}
    seconds, flops = ({name: one[field] for name, one in found.items()} for field in ("seconds", "tflops"))
    needed = {f"plain {cap}" for cap in PLAIN} | {f"{c} + {r}, {o}" for c, r in ZOOM for o in ("no zoom", "zoomed")}
    ratios = compare(seconds, flops, zoom_shares()) if needed <= found.keys() else []
    return {
        "benchmark": "scale",
        "weights": "random: speed only",
        "layers": whole,
        "lines": lines,
        "cases": found,
        "ratios": ratios,
    }


def markdown(record: dict[str, Any]) -> str:
    """The page."""
    last = record["lines"][-1]
    where = last["machine"]
    clock = "processor seconds, so that other work does not count" if last["clock"] == "cpu" else "seconds"
    parts = [
        "# Time at a published model's sizes\n",
        f"Random weights: speed only, nothing about accuracy. Sizes of {last['name']} ({record['layers']} decoder "
        f"layers), {last['dtype']}, {last['answer_tokens']} answer tokens, {where['threads']} thread(s) of an "
        f"{where['cpu']}, torch {where['torch']}, transformers {where['transformers']}; {clock}, one repetition. "
        "Made by `python -m benchmarks.scale`.\n",
        "A zoomed question and one that the coarse look settles are timed with the gate forced to yes and to no; their "
        "mean is weighted with the share of questions that the embedded model zooms at equal accuracy (ladder.json). "
        "More than 100 % is reached where the plain look's long attention runs at fewer operations a second than the "
        "rest.\n",
    ]
    names = ("faster", "operations")
    rows = [["Kind, share zoomed", "pair", "plain cap", "times faster", "times fewer operations", "reached"]]
    rows += [
        [
            f"{r['kind']}, {r['share']:.0%}",
            r["pair"],
            str(r["cap"]),
            *(f"{r[k]:.2f}" for k in names),
            f"{r['reached']:.0%}",
        ]
        for r in record["ratios"]
    ]
    parts.append(markdown_table(rows) if record["ratios"] else "Not all cases are measured yet.\n")
    deep = sorted({line["layers"] for line in record["lines"]})
    rows = [
        [
            "Case",
            *(f"{depth} layers: s" for depth in deep),
            "TFLOP of the deepest",
            "at full depth: s",
            "TFLOP",
            "TFLOP a second",
        ]
    ]
    for name, one in record["cases"].items():
        own = {line["layers"]: line for line in record["lines"] if line["case"] == name}
        cells = [f"{own[depth]['seconds']:.1f}" if depth in own else "–" for depth in deep]
        deepest = own[max(own)]
        note = "" if one["measured"] else " (extended)"
        rows.append([name, *cells, f"{deepest['tflops']:.2f}", f"{one['seconds']:.1f}{note}", f"{one['tflops']:.2f}"])
        rows[-1].append(f"{one['tflops'] / one['seconds']:.3f}")
    parts += ["## Cases\n", markdown_table(rows)]
    parts.append(_straight(record["lines"], record["layers"]))
    return "\n".join(parts).rstrip() + "\n"


def _straight(lines: list[dict[str, Any]], whole: int) -> str:
    """How well a straight line through two smaller depths foretells what was measured at the full one."""
    said = []
    for name in dict.fromkeys(line["case"] for line in lines):
        real = next((line["seconds"] for line in lines if line["case"] == name and line["layers"] == whole), None)
        told = at_depth([line for line in lines if line["layers"] != whole], name, "seconds", whole)
        if real and told:
            said.append(f"{name} {told[0]:.1f} s for {real:.1f} s measured ({told[0] / real - 1:+.0%})")
    if not said:
        return ""
    return f"Extended cases lie on the straight line through two smaller depths. It foretells: {'; '.join(said)}.\n"


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--config", type=Path, help="config.json of the model whose sizes are timed")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers to build; 0: all")
    parser.add_argument("--only", nargs="+", help="cases to measure")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: beside other work")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4, help="answer tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--store", type=Path, default=Path("runs/scale.jsonl"), help="one line per measured case")
    parser.add_argument("--report", action="store_true", help="write docs/results/scale.md and .json from the store")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.store.read_text().splitlines()] if args.store.is_file() else []
    if args.report:
        record = report(lines)
        (RESULTS / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "scale.md").write_text(markdown(record))
        return
    if args.config is None:
        parser.error("--config is needed to measure.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    made = depths(args.config, args.layers)
    done = {line["case"] for line in lines if line["layers"] == made["layers"]}
    model = build_model(made, getattr(torch, args.dtype), args.device)
    facts = {name: made[name] for name in ("layers", "of", "K", "T")} | {"name": args.config.parent.name}
    facts |= {"parameters": sum(weight.numel() for weight in model.engine.backbone.model.parameters())}
    facts |= {"dtype": args.dtype, "answer_tokens": args.tokens}
    args.store.parent.mkdir(parents=True, exist_ok=True)
    for name, work in {"warm": warm(model), **cases(model, args.tokens)}.items():
        if name in done or (args.only and name not in (*args.only, "warm")):
            continue
        found = measure(name, work, args.repeats, args.device, args.clock)
        tflops = round(operations(model, found.pop("answer")) / 1e12, 4)
        line = found | {"tflops": tflops, "machine": machine(args.device)} | facts
        print(json.dumps(line), flush=True)
        if name != "warm":
            with args.store.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
