"""Time the engine against transformers' own `generate` on the same random weights.

One run measures the following, with the repetitions of all cases interleaved so that other load affects all equally:

- a fresh question that is not zoomed (with and without the gate) against `generate`;
- a second such question in a session against `generate`;
- a fresh zoomed question;
- a batch of eight, half of them zoomed, against eight single calls;
- prefill (an answer of one token) and decoding (time per further token);
- the time of `import qzoom`, the load time and the peak memory of `qzoom ask` (embedded model).

Random weights: figures of speed only, never of accuracy. Usage: python benchmarks/engine.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from PIL import Image

import qzoom
from qzoom.config import TokenBudget, ZoomConfig
from qzoom.engine.state import Engine
from qzoom.heads.branches import new_gate, new_region
from qzoom.model import QZoom

FIRST = "What is the total amount on this receipt, taxes included?"
SECOND = "On which date was it printed, and by whom?"
FULL = {
    "layers": 28, "hidden": 1024, "mlp": 3072, "heads": 16, "kv_heads": 8, "head_dim": 128, "vocabulary": 32000,
    "vision_layers": 12, "vision_hidden": 768, "vision_mlp": 3072, "vision_heads": 12, "coarse": 576, "region": 144,
}  # fmt: skip
QUICK = FULL | {
    "layers": 8, "hidden": 256, "mlp": 768, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 4000,
    "vision_layers": 4, "vision_hidden": 256, "vision_mlp": 768, "vision_heads": 4, "coarse": 144, "region": 36,
}  # fmt: skip


def build_model(shape: dict[str, int], dtype: torch.dtype, device: str) -> QZoom:
    """A Qwen3-VL of this shape with random weights, branches included."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from qzoom.backbones.registry import build_backbone
    from tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([FIRST, SECOND], 400)
    ids = {
        name: int(tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]
        for name, text in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    half = shape["head_dim"] // 2
    third = half // 3
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": shape["vocabulary"],
            "hidden_size": shape["hidden"],
            "intermediate_size": shape["mlp"],
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "num_key_value_heads": shape["kv_heads"],
            "head_dim": shape["head_dim"],
            "max_position_embeddings": 32768,
            "rope_parameters": rope | {"mrope_section": [half - 2 * third, third, third]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": shape["vision_layers"],
            "hidden_size": shape["vision_hidden"],
            "intermediate_size": shape["vision_mlp"],
            "num_heads": shape["vision_heads"],
            "out_hidden_size": shape["hidden"],
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = shape["vocabulary"] + 1  # never drawn: every answer has full length
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    backbone = build_backbone(model, tokenizer, Qwen2VLImageProcessorPil(patch_size=16))
    layers = shape["layers"] * 2 // 3
    budget, region = (TokenBudget(shape[name], shape[name]) for name in ("coarse", "region"))
    zoom = ZoomConfig(shared_layers=layers, branch_layers=3, coarse_tokens=budget, region_tokens=region)
    heads = (part(backbone, layers, 3).eval().requires_grad_(False) for part in (new_gate, new_region))
    return QZoom(Engine(backbone, *heads, config=zoom), "random")


class Plain:
    """transformers' own way: its processor, its template, its `generate`."""

    def __init__(self, model: QZoom, side_px: int) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.backbone = model.engine.backbone
        size = {"shortest_edge": side_px**2, "longest_edge": side_px**2}
        self.processor = Qwen2VLImageProcessorPil(patch_size=16, size=size)

    @torch.inference_mode()
    def ask(self, picture: Image.Image, question: str, tokens: int) -> tuple[int, ...]:
        backbone = self.backbone
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = dict(self.processor(images=[picture], return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod()) // 4
        ids = backbone.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
        inputs |= {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == backbone.image_token_id).long()
        inputs = {name: value.to(backbone.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(backbone.dtype)
        out = backbone.model.generate(**inputs, max_new_tokens=tokens)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


def cases(model: QZoom, tokens: int, shape: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name."""
    side = round(shape["coarse"] ** 0.5) * 32
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 256, (side + 64 * i, side + 32 * i, 3), dtype=np.uint8)) for i in range(8)]
    plain, session = Plain(model, side), model.session(pages[0])
    session.ask(FIRST, zoom="never", max_new_tokens=1)
    zoom = {"gate_threshold": 0.0, "region_threshold": 0.0}
    stay = {"gate_threshold": 1.0}
    mixed = [zoom if i % 2 else stay for i in range(8)]
    questions = [(page, FIRST if i % 3 else SECOND) for i, page in enumerate(pages)]

    def batch(n: int) -> list[Any]:
        thresholds = {"gate_threshold": [m["gate_threshold"] for m in mixed], "region_threshold": 0.0}
        return [a.tokens for a in model.ask_batch(questions, max_new_tokens=n, **thresholds)]

    def single(n: int) -> list[Any]:
        return [
            model.ask(*q, max_new_tokens=n, **(m | {"region_threshold": 0.0})).tokens
            for q, m in zip(questions, mixed, strict=True)
        ]

    out: dict[str, Callable[[], Any]] = {}
    for label, n in (("first", 1), ("whole", tokens)):
        out |= {
            f"8 single calls/{label}": lambda n=n: single(n),
            f"batch of 8/{label}": lambda n=n: batch(n),
            f"generate/{label}": lambda n=n: plain.ask(pages[0], SECOND, n),
            f"auto, no zoom/{label}": lambda n=n: model.ask(pages[0], SECOND, max_new_tokens=n, **stay).tokens,
            f"never/{label}": lambda n=n: model.ask(pages[0], SECOND, zoom="never", max_new_tokens=n).tokens,
            f"session, 2nd/{label}": lambda n=n: session.ask(SECOND, max_new_tokens=n, **stay).tokens,
            f"auto, zoom/{label}": lambda n=n: model.ask(pages[0], SECOND, max_new_tokens=n, **zoom).tokens,
        }
    return out


def measure(todo: dict[str, Callable[[], Any]], repeats: int, *, cuda: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of every case, repetitions interleaved, and each one's last result.

    The first, unmeasured round runs the answers of one token only; the long cases (eight questions) run at most twice.
    """
    times: dict[str, list[float]] = {name: [] for name in todo}
    results: dict[str, Any] = {}
    gc.disable()
    for turn in range(repeats + 1):
        for name, work in todo.items():
            if (turn == 0 and ("8" in name or not name.endswith("/first"))) or (turn > 2 and "8" in name):
                continue
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            results[name] = work()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
        gc.collect()
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}, results


def summary(seconds: dict[str, float], results: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Ratios, prefill and decoding apart, and whether the answers agree."""

    def ratio(one: str, other: str, part: str = "whole") -> float:
        return round(seconds[f"{one}/{part}"] / seconds[f"{other}/{part}"], 3)

    names = [name.removesuffix("/first") for name in seconds if name.endswith("/first")]
    decode = {n: (seconds[f"{n}/whole"] - seconds[f"{n}/first"]) / max(1, tokens - 1) for n in names}
    alike = {
        name: results[f"{name}/whole"] == results[f"{other}/whole"]
        for name, other in (
            ("auto, no zoom", "generate"),
            ("never", "generate"),
            ("session, 2nd", "generate"),
            ("batch of 8", "8 single calls"),
        )
    }
    return {
        "unzoomed_auto_vs_generate": ratio("auto, no zoom", "generate"),
        "unzoomed_never_vs_generate": ratio("never", "generate"),
        "session_second_vs_generate": ratio("session, 2nd", "generate"),
        "batch8_vs_8_single": ratio("batch of 8", "8 single calls"),
        "batch8_prefill_vs_8_single": ratio("batch of 8", "8 single calls", "first"),
        "zoomed_vs_generate": ratio("auto, zoom", "generate"),
        "prefill_auto_vs_generate": ratio("auto, no zoom", "generate", "first"),
        "prefill_never_vs_generate": ratio("never", "generate", "first"),
        "decode_vs_generate": round(decode["never"] / decode["generate"], 3),
        "prefill_s": {n: round(seconds[f"{n}/first"], 4) for n in names},
        "decode_ms_per_token": {n: round(value * 1000, 2) for n, value in decode.items()},
        "seconds": {n.removesuffix("/whole"): round(s, 4) for n, s in seconds.items() if n.endswith("/whole")},
        "same_tokens": alike,
    }  # fmt: skip


def commands() -> dict[str, Any]:
    """Import time, load time and peak memory of the real command, each in a process of its own."""
    code = "import time; t = time.perf_counter(); import qzoom; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    out: dict[str, Any] = {"import_qzoom_s": round(statistics.median(imports), 4)}
    if not (Path(qzoom.__file__).parent / "assets" / "tiny").is_dir():
        return out | {"qzoom_ask": "no embedded model"}
    code = (
        "import time; t = time.perf_counter(); from qzoom import QZoom; QZoom.from_pretrained('tiny'); "
        "print(time.perf_counter() - t)"
    )
    loads = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.png"
        Image.new("RGB", (800, 1600), "white").save(page)
        start = time.perf_counter()
        command = [sys.executable, "-m", "qzoom", "ask", str(page), "What is the total?", "--json", "--quiet"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
    scale = 1 if sys.platform == "darwin" else 1024
    return out | {
        "load_s": round(statistics.median(loads), 3),
        "qzoom_ask_s": round(wall, 3),
        "qzoom_ask_peak_mib": round(used.ru_maxrss * scale / 2**20),
        "qzoom_ask_code": child.returncode,
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    import transformers

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "qzoom": qzoom.__version__,
    }


def print_table(dtype: str, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    table = Table(title=f"{dtype}: random weights, speed only", title_justify="left")
    for column in ("case", "whole s", "prefill s", "decode ms/token"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, value in found["seconds"].items():
        first, step = found["prefill_s"].get(name), found["decode_ms_per_token"].get(name)
        table.add_row(
            name, f"{value:.3f}", "" if first is None else f"{first:.3f}", "" if step is None else f"{step:.1f}"
        )
    console.print(table)
    for key, goal in (("unzoomed_auto_vs_generate", 1.05), ("session_second_vs_generate", 0.17)):
        console.print(f"{key}: {found[key]:.3f} (goal <= {goal})")
    for key in (
        "unzoomed_never_vs_generate",
        "batch8_vs_8_single",
        "batch8_prefill_vs_8_single",
        "zoomed_vs_generate",
        "decode_vs_generate",
    ):
        console.print(f"{key}: {found[key]:.3f}")
    console.print(f"same tokens: {found['same_tokens']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="use a small model shape, to test the benchmark itself")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="answer tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--hidden", type=int, help="decoder width (the MLP is three times as wide)")
    parser.add_argument("--no-commands", action="store_true", help="skip import, load and memory figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = dict(QUICK if args.quick else FULL)
    if args.hidden:
        shape |= {"hidden": args.hidden, "mlp": 3 * args.hidden, "heads": args.hidden // shape["head_dim"]}
    record: dict[str, Any] = {"benchmark": "engine", "weights": "random", "shape": shape, "tokens": args.tokens}
    record |= {"repeats": args.repeats, "machine": machine(args.device), "dtypes": {}}
    if not args.no_commands:
        record |= commands()
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        model = build_model(shape, getattr(torch, dtype), args.device)
        record["parameters"] = sum(p.numel() for p in model.engine.backbone.model.parameters())
        seconds, results = measure(cases(model, args.tokens, shape), args.repeats, cuda=args.device == "cuda")
        record["dtypes"][dtype] = summary(seconds, results, args.tokens)
        print_table(dtype, record["dtypes"][dtype])
        del model
        gc.collect()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
