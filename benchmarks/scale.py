"""Time plain and zoomed answers at a published model's sizes, with random weights.

Random weights: speed only, never accuracy. What a zoomed question costs, and one that the coarse look settles, is timed
with the gate forced to yes and to no; the mean of the two is weighted with the share of questions that the embedded
model zooms at equal accuracy (docs/results/ladder.json). Every time stands beside the ratio of operations, so the page
says how much of what arithmetic promises is reached.

Usage: python benchmarks/scale.py --config CONFIG.json [--device cuda] [--output docs/results/scale.json]
`CONFIG.json` is the `config.json` of a Qwen3-VL checkpoint (transformers 4.57 or 5 field names).
"""

from __future__ import annotations

import argparse
import gc
import json
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
from qzoom.heads.branches import new_gate, new_region
from qzoom.model import QZoom
from qzoom.types import Answer

PLAIN = (1024, 4096)
ZOOM = ((144, 144), (64, 144))
LADDER = Path(__file__).parent.parent / "docs" / "results" / "ladder.json"


def build_model(path: Path, dtype: torch.dtype, device: str, depth: tuple[int, int]) -> QZoom:
    """The configured model, weights uniform in +-0.02, with K shared and T branch layers from `depth`."""
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
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("model_type", "architectures")}
    config = Qwen3VLConfig(**values | ids)
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model = _fill(model, device)
    model.generation_config.eos_token_id = config.text_config.vocab_size + 1  # never drawn: full-length answers
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    backbone = build_backbone(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size))
    heads = (part(backbone, *depth).eval().requires_grad_(False) for part in (new_gate, new_region))
    return QZoom(Engine(backbone, *heads, config=ZoomConfig(shared_layers=depth[0], branch_layers=depth[1])), "random")


def _fill(model: Any, device: str) -> Any:
    """Memory for all parameters, with random values; the buffers (rotary frequencies) are computed again."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if name.endswith("norm.weight") else weight.uniform_(-0.02, 0.02)
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


def measure(
    todo: dict[str, Callable[[], Answer]], repeats: int, device: str
) -> tuple[dict[str, float], dict[str, Answer]]:
    """Least seconds of every case over interleaved repetitions, after one round that is not measured."""
    seconds: dict[str, float] = {}
    answers: dict[str, Answer] = {}
    gc.disable()
    for turn in range(repeats + 1):
        for name, work in todo.items():
            _wait(device)
            start = time.perf_counter()
            answers[name] = work()
            _wait(device)
            spent = time.perf_counter() - start
            print(f"{name}: {spent:.2f} s", flush=True)
            if turn or not repeats:
                seconds[name] = min(spent, seconds.get(name, spent))
        gc.collect()
    gc.enable()
    return seconds, answers


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


def compare(seconds: dict[str, float], flops: dict[str, int], shares: dict[str, float]) -> list[dict[str, Any]]:
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


def main() -> None:
    """Measure and print; write the record with `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--config", type=Path, required=True, help="config.json of the model whose sizes are timed")
    parser.add_argument("--shared-layers", type=int, default=24, help="K")
    parser.add_argument("--branch-layers", type=int, default=3, help="T")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4, help="answer tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build_model(args.config, getattr(torch, args.dtype), args.device, (args.shared_layers, args.branch_layers))
    count = sum(weight.numel() for weight in model.engine.backbone.model.parameters())
    seconds, answers = measure(cases(model, args.tokens), args.repeats, args.device)
    flops = {name: operations(model, answer) for name, answer in answers.items()}
    record = {
        "benchmark": "scale",
        "weights": "random: speed only",
        "parameters": count,
        "machine": machine(args.device),
        "dtype": args.dtype,
        "answer_tokens": args.tokens,
        "cases": {
            name: {"seconds": round(seconds[name], 4), "tflops": round(flops[name] / 1e12, 3)} for name in seconds
        },
        "ratios": compare(seconds, flops, zoom_shares()),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
