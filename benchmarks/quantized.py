"""Size, speed and closeness of a base in 4 and 8 bit, on a random model of about 300 million parameters.

Random weights: the figures show arithmetic, memory and speed, never accuracy. Usage: python benchmarks/quantized.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from engine import FULL, QUICK, build_model, machine
from PIL import Image

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import Stopwatch
from qzoom.images.geometry import iou
from qzoom.model import QZoom

SHAPE = FULL | {"layers": 18, "coarse": 144, "region": 64}
QUESTION = "What is the total?"


def measure(model: QZoom, picture: Image.Image, tokens: int) -> dict[str, Any]:
    """One form of the model: memory of its weights, milliseconds per answer token, first logits, region."""
    engine = model.engine
    held = {t.data_ptr(): t.numel() * t.element_size() for t in engine.backbone.model.state_dict().values()}
    options: dict[str, Any] = {"zoom": "always", "region_threshold": 0.5}
    short, whole = [], []
    for _ in range(3):
        for count, seconds in ((1, short), (tokens, whole)):
            start = time.perf_counter()
            answer = model.ask(picture, QUESTION, max_new_tokens=count, ignore_eos=True, **options)
            seconds.append(time.perf_counter() - start)
    clock = Stopwatch(engine.backbone.device)
    requests = [model.request(picture, QUESTION, zoom="never")]
    logits = prefill(engine, coarse_pass(engine, requests, clock), clock)[0].logits.float()
    return {
        "memory_mb": sum(held.values()) / 1e6,
        "prefill_ms": statistics.median(short) * 1000,
        "token_ms": (statistics.median(whole) - statistics.median(short)) * 1000 / (tokens - 1),
        "logits": logits,
        "boxes": [region.box for region in answer.regions],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="use a small model shape, to test the benchmark itself")
    parser.add_argument("--tokens", type=int, default=16, help="answer tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = QUICK if args.quick else SHAPE
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 480, 3), dtype=np.uint8))
    record: dict[str, Any] = {"benchmark": "quantized", "weights": "random", "machine": machine("cpu"), "forms": {}}
    with tempfile.TemporaryDirectory() as scratch:
        made = build_model(shape, torch.bfloat16, "cpu").engine
        record["parameters"] = sum(weight.numel() for weight in made.backbone.model.parameters())
        base = save_pretrained(
            dataclasses.replace(made, gate=None, region=None), Path(scratch, "base"), include_base=True
        )
        adapter = save_pretrained(made, Path(scratch, "adapter"), base_id=str(base))
        del made
        first: dict[str, Any] = {}
        for form in (None, "8bit", "4bit"):
            model = QZoom.from_pretrained(adapter, dtype="bfloat16", quantization=form)
            found = measure(model, picture, args.tokens)
            first = first or found
            folder = Path(scratch, f"saved-{form}")
            save_pretrained(dataclasses.replace(model.engine, gate=None, region=None), folder, include_base=True)
            files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            pairs = zip(found["boxes"], first["boxes"], strict=False)
            logits = found["logits"]
            record["forms"][form or "bfloat16"] = {
                "disk_mb": round(files / 1e6, 1),
                "cosine": round(float(torch.nn.functional.cosine_similarity(logits, first["logits"], dim=0)), 5),
                "same_first_token": bool(logits.argmax() == first["logits"].argmax()),
                "box_iou": [round(iou(a, b), 3) for a, b in pairs],
                **{name: round(value, 1) for name, value in found.items() if isinstance(value, float)},
            }
            print(form or "bfloat16", record["forms"][form or "bfloat16"], flush=True)
            del model
    print(json.dumps(record))


if __name__ == "__main__":
    main()
