"""Time the engine against transformers' own `generate` on the same random weights.

One run measures the following, with the repetitions of all cases interleaved so that other load affects all equally:

- a fresh question that is not zoomed (with and without the gate) against `generate`;
- a second such question in a session against `generate`;
- a fresh zoomed question;
- a batch of eight, half of them zoomed, against eight single calls;
- of every case the time to the first token and per further token;
- the time of `import qzoom`, the load time and the peak memory of `qzoom ask` (embedded model).

Random weights: figures of speed only, never of accuracy.
Usage: python benchmarks/engine.py [--quick] [--results docs/results]
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
from qzoom.engine.batch import ContinuousBatch
from qzoom.engine.request import Request
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


class FirstToken:
    """A streamer for transformers' `generate` that notes when the first token came."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, _: Any) -> None:
        """Called with the prompt, then with every token."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Called at the end."""


Timed = tuple[list[tuple[int, ...]], float, float]
"""The tokens of every answer, seconds until all had their first one, seconds in all."""


class Plain:
    """transformers' own way: its processor, its template, its `generate`."""

    def __init__(self, model: QZoom, side_px: int) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.backbone = model.engine.backbone
        size = {"shortest_edge": side_px**2, "longest_edge": side_px**2}
        self.processor = Qwen2VLImageProcessorPil(patch_size=16, size=size)

    @torch.inference_mode()
    def ask(self, picture: Image.Image, question: str, tokens: int) -> Timed:
        start, streamer = time.perf_counter(), FirstToken()
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
        out = backbone.model.generate(**inputs, max_new_tokens=tokens, streamer=streamer)
        answer = tuple(out[0, inputs["input_ids"].shape[1] :].tolist())
        return [answer], streamer.at - start, time.perf_counter() - start


def answered(model: QZoom, make: Callable[[], list[Request]]) -> Timed:
    """Requests that are made, run together and decoded to their ends."""
    start = time.perf_counter()
    batch = ContinuousBatch(model.engine)
    events = list(batch.add(dict(enumerate(make()))))
    first = time.perf_counter() - start
    answers = {key: event.answer for key, event in [*events, *batch.run()] if event.answer is not None}
    return [answers[key].tokens for key in sorted(answers)], first, time.perf_counter() - start


def cases(model: QZoom, tokens: int, shape: dict[str, int]) -> dict[str, Callable[[], Timed]]:
    """Everything that is timed, by name."""
    side = round(shape["coarse"] ** 0.5) * 32
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 256, (side + 64 * i, side + 32 * i, 3), dtype=np.uint8)) for i in range(8)]
    plain, session = Plain(model, side), model.session(pages[0])
    common: dict[str, Any] = {"max_new_tokens": tokens, "region_threshold": 0.0}
    zoom, stay = common | {"gate_threshold": 0.0}, common | {"gate_threshold": 1.0}
    questions = [(page, FIRST if i % 3 else SECOND, zoom if i % 2 else stay) for i, page in enumerate(pages)]
    requests = [lambda q=q: [model.request(q[0], q[1], **q[2])] for q in questions]

    def single() -> Timed:
        parts = [answered(model, make) for make in requests]
        return [answer for p in parts for answer in p[0]], sum(p[1] for p in parts), sum(p[2] for p in parts)

    def one(make: Callable[[], Request]) -> Callable[[], Timed]:
        return lambda: answered(model, lambda: [make()])

    return {
        "generate": lambda: plain.ask(pages[0], SECOND, tokens),
        "auto, no zoom": one(lambda: model.request(pages[0], SECOND, **stay)),
        "never": one(lambda: model.request(pages[0], SECOND, zoom="never", **common)),
        "session, 2nd": one(lambda: session.request(SECOND, **stay)),
        "auto, zoom": one(lambda: model.request(pages[0], SECOND, **zoom)),
        "8 single calls": single,
        "batch of 8": lambda: answered(model, lambda: [make()[0] for make in requests]),
    }


def measure(
    todo: dict[str, Callable[[], Timed]], repeats: int, long_repeats: int
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Median seconds of every case to the first token and in all, repetitions interleaved, and its last answers.

    The first, unmeasured round leaves the long cases (eight questions) out; they run `long_repeats` times.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    results: dict[str, Any] = {}
    gc.disable()
    for turn in range(max(repeats, long_repeats) + 1):
        for name, work in todo.items():
            if ("8" in name and not 0 < turn <= long_repeats) or turn > repeats:
                continue
            results[name], first, whole = work()
            if turn:
                times[name].append((first, whole))
        gc.collect()
    gc.enable()
    middle = statistics.median
    return {name: (middle(t[0] for t in v), middle(t[1] for t in v)) for name, v in times.items()}, results


def summary(seconds: dict[str, tuple[float, float]], results: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Ratios, prefill and decoding apart, and whether the answers agree."""
    step = {name: (whole - first) / max(1, tokens - 1) for name, (first, whole) in seconds.items()}

    def ratio(one: str, other: str, part: int = 1) -> float:
        return round(seconds[one][part] / seconds[other][part], 3)

    def batch_of(length: int) -> float:
        one, other = (seconds[name][0] + (length - 1) * step[name] for name in ("batch of 8", "8 single calls"))
        return round(one / other, 3)

    pairs = [(name, "generate") for name in ("auto, no zoom", "never", "session, 2nd")]
    return {
        "unzoomed_auto_vs_generate": ratio("auto, no zoom", "generate"),
        "unzoomed_never_vs_generate": ratio("never", "generate"),
        "session_second_vs_generate": ratio("session, 2nd", "generate"),
        "zoomed_vs_generate": ratio("auto, zoom", "generate"),
        "prefill_auto_vs_generate": ratio("auto, no zoom", "generate", 0),
        "decode_vs_generate": round(step["never"] / step["generate"], 3),
        "batch8_vs_8_single": ratio("batch of 8", "8 single calls"),
        "batch8_prefill_vs_8_single": ratio("batch of 8", "8 single calls", 0),
        "batch8_step_vs_8_single": round(step["batch of 8"] / step["8 single calls"], 3),
        "batch8_at_length": {str(length): batch_of(length) for length in (32, 128)},
        "prefill_s": {name: round(first, 3) for name, (first, _) in seconds.items()},
        "seconds": {name: round(whole, 3) for name, (_, whole) in seconds.items()},
        "decode_ms_per_token": {name: round(value * 1000, 1) for name, value in step.items()},
        "same_tokens": {
            one: results[one] == results[other] for one, other in [*pairs, ("batch of 8", "8 single calls")]
        },
    }


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


GOALS = {
    "unzoomed_auto_vs_generate": ("un-zoomed answer, gate asked, to generate", 1.05),
    "unzoomed_never_vs_generate": ('un-zoomed answer, zoom "never", to generate', None),
    "session_second_vs_generate": ("second un-zoomed question in a session, to generate", 0.17),
    "zoomed_vs_generate": ("zoomed answer to generate", None),
    "prefill_auto_vs_generate": ("prefill, gate asked, to generate", None),
    "decode_vs_generate": ("decode step to generate's, one row", 1.1),
    "batch8_vs_8_single": ("batch of 8 mixed to 8 single calls", 0.8),
    "batch8_prefill_vs_8_single": ("the same, to the first token", 1.0),
    "batch8_step_vs_8_single": ("the same, a decode step", None),
}
"""Ratio -> its words and the most that it should be."""


def page(record: dict[str, Any], dtype: str) -> str:
    """docs/results/engine.md."""
    found, shape, where = record["dtypes"][dtype], record["shape"], record["machine"]
    rows = [
        f"| {name} | {whole:.2f} | {found['prefill_s'][name]:.2f} | {found['decode_ms_per_token'][name]:.0f} |"
        for name, whole in found["seconds"].items()
    ]
    ratios = [f"| {words} | {found[key]} | {goal or ''} |" for key, (words, goal) in GOALS.items()]
    later = ", ".join(f"{value} with {length}" for length, value in found["batch8_at_length"].items())
    same = all(found["same_tokens"].values())
    same = "Same tokens as generate and as single calls in every case."
    if not all(found["same_tokens"].values()):
        same = f"TOKENS DIFFER: {json.dumps(found['same_tokens'])}"
    lines = [
        "# The engine beside transformers' own generate",
        "",
        f"Random weights: speed only, nothing about accuracy. Qwen3-VL shape, {shape['layers']} layers, width "
        f"{shape['hidden']}, {record['parameters'] / 1e6:.0f} M parameters, {shape['coarse']} coarse tokens, regions "
        f"of {shape['region']}, {record['tokens']} answer tokens, {dtype}, {where['threads']} threads of an "
        f"{where['cpu'].strip()}, torch {where['torch']} ({where['device']}), transformers {where['transformers']}; "
        f"medians of {record['repeats']} interleaved repetitions in one process, of the cases with eight questions "
        f"{record['long_repeats']}. Made by `python benchmarks/engine.py --results docs/results`.",
        "",
        "| Case | s | s to the first token | ms a further token (of all eight) |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        "| Ratio | | Goal |",
        "|---|---:|---:|",
        *ratios,
        "",
        f"{same} A batch of eight takes its pictures and prompts at about the price of single calls and decodes eight "
        "rows in one step, so it gains with the length of the answers: computed from the times above, its ratio to "
        f"single calls is {later} tokens.",
    ]
    if "load_s" in record:
        lines += [
            "",
            f"`import qzoom` {record['import_qzoom_s'] * 1000:.0f} ms; loading the embedded model "
            f"{record['load_s']:.1f} s, nearly all of it importing torch and transformers; `qzoom ask` "
            f"{record['qzoom_ask_s']:.1f} s from start to end, peak memory {record['qzoom_ask_peak_mib']} MiB.",
        ]
    return "\n".join(lines) + "\n"


def shape_of(*, quick: bool, hidden: int | None, **sizes: int | None) -> dict[str, int]:
    """The model's sizes; another width changes MLP and heads with it."""
    shape = dict(QUICK if quick else FULL)
    if hidden:
        heads = max(2, hidden // shape["head_dim"])
        shape |= {"hidden": hidden, "mlp": 3 * hidden, "heads": heads, "kv_heads": heads // 2}
    return shape | {name: size for name, size in sizes.items() if size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="use a small model shape, to test the benchmark itself")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-repeats", type=int, default=1, help="repetitions of the cases with eight questions")
    parser.add_argument("--tokens", type=int, default=8, help="answer tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--hidden", type=int, help="decoder width (the MLP is three times as wide)")
    parser.add_argument("--layers", type=int, help="decoder layers")
    parser.add_argument("--coarse", type=int, help="visual tokens of the coarse pass, a square number")
    parser.add_argument("--region", type=int, help="visual tokens of a region")
    parser.add_argument("--no-commands", action="store_true", help="skip import, load and memory figures")
    parser.add_argument("--results", type=Path, help="folder for the page, engine.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {"layers": args.layers, "coarse": args.coarse, "region": args.region}
    shape = shape_of(quick=args.quick, hidden=args.hidden, **sizes)
    record: dict[str, Any] = {"benchmark": "engine", "weights": "random", "shape": shape, "tokens": args.tokens}
    record |= {"repeats": args.repeats, "long_repeats": args.long_repeats, "machine": machine(args.device)}
    record["dtypes"] = {}
    if not args.no_commands:
        record |= commands()
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        model = build_model(shape, getattr(torch, dtype), args.device)
        record["parameters"] = sum(p.numel() for p in model.engine.backbone.model.parameters())
        seconds, results = measure(cases(model, args.tokens, shape), args.repeats, args.long_repeats)
        record["dtypes"][dtype] = summary(seconds, results, args.tokens)
        text = page(record, dtype)
        print(text)
        if args.results is not None:
            (args.results / "engine.md").write_text(text, encoding="utf-8")
        del model
        gc.collect()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
