"""The plug-in in a real vLLM, against the native engine in float32: tokens, texts, boxes, gate scores, usage.

`make test-vllm` runs it in an environment of its own. QZOOM_VLLM_QUESTIONS is the number of questions (60), and
QZOOM_RECEIPTS a folder of receipts with `dev.jsonl`; without it drawn pictures take their place.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("vllm")

from vllm.v1.metrics.reader import get_metrics_snapshot

from qzoom import QZoom
from qzoom.backbones.registry import build_backbone
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.load import checkpoint_identity, load_engine
from qzoom.data.benchmarks.registry import open_task
from qzoom.errors import EngineDownError
from qzoom.integrations.vllm.arguments import command_line, engine_arguments
from qzoom.serving.engines.base import Job, ServingEngine
from qzoom.serving.engines.remote import RemoteEngine
from qzoom.serving.engines.vllm import VllmEngine
from qzoom.serving.server import bind
from qzoom.serving.settings import SchedulerLimits
from qzoom.types import Answer
from tests.checkpoints.folders import copy, edit_json, write_merged
from tests.flow import read_once
from tests.serving.running import chat, image_part, page, running, user
from tests.tiny_models import build_engine, build_model, image_processor, llava_tokenizer, tokenizer

COUNT = int(os.environ.get("QZOOM_VLLM_QUESTIONS", "60"))
SMALL = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 2048, "max_num_seqs": 8}
EXAMPLES = Path(__file__).parents[3] / "examples"
AT_ONCE = 6


@dataclass(frozen=True)
class Case:
    """A question with what the native engine says."""

    pictures: list[Any]
    question: Any
    options: dict[str, Any] = field(default_factory=dict)


def cases(count: int) -> list[Case]:
    """Questions about receipts, documents and scenes: one to three pictures, two turns, thresholds above and below."""
    tasks = [open_task(name, count=max(4, count // 8)) for name in ("documents", "scenes")]
    if folder := os.environ.get("QZOOM_RECEIPTS"):
        tasks.append(open_task("receipts", data=Path(folder)))
    samples = []
    for task in tasks:
        own = [task.sample(i) for i in range(min(len(task.ids), max(4, count // 8)))]
        samples += [[(sample.image, question.question) for sample in own for question in sample.questions]]
    draw = random.Random(0)
    out = []
    for i in range(count):
        pairs = samples[i % len(samples)]
        image, question = pairs[(i // len(samples)) % len(pairs)]
        more = [draw.choice(draw.choice(samples))[0] for _ in range((0, 0, 0, 1, 2)[i % 5])]
        options: dict[str, Any] = {"gate_threshold": (None, None, 0.9999, 1.0)[i % 4], "max_new_tokens": 24}
        if i % 7 == 3:
            options["zoom"] = ("always", "never")[i % 2]
        if i % 6 == 5:
            first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
            turns = [first, {"role": "assistant", "content": "A page."}, {"role": "user", "content": question}]
            out.append(Case([image], turns, options))
        else:
            out.append(Case([image, *more], question, options))
    return out


def facts(answer: Answer) -> dict[str, Any]:
    """What must be equal; the gate's score is compared to four places."""
    return {
        "tokens": answer.tokens,
        "text": answer.text,
        "boxes": [(region.box, region.image, region.tokens, region.crop_size_px) for region in answer.regions],
        "zoomed": answer.gate.zoomed,
        "note": answer.gate.note,
        "score": None if answer.gate.score is None else round(answer.gate.score, 4),
        "finish": answer.finish_reason,
        "prompt": answer.usage.prompt_tokens,
        "completion": answer.usage.completion_tokens,
    }


@contextmanager
def vllm(checkpoint: str, **options: Any) -> Iterator[tuple[VllmEngine, asyncio.Runner]]:
    """An engine, and the loop that it lives on."""
    front = QZoom(load_engine(checkpoint, dtype="float32", base_weights=False), checkpoint)
    arguments = engine_arguments(checkpoint, visual_tokens=4096) | SMALL | options
    with asyncio.Runner() as runner:
        engine = VllmEngine(front, SchedulerLimits(slots=64), arguments)
        try:
            yield engine, runner
        finally:
            runner.run(engine.close())


async def ask(engine: ServingEngine, case: Case) -> Answer:
    request = engine.model.request(case.pictures, case.question, **case.options)
    texts = []
    async for event in engine.answer(Job(request)):
        texts.append(event.text)
    assert event.answer is not None
    assert "".join(texts) == event.answer.text
    return event.answer


async def ask_all(engine: ServingEngine, questions: list[Case]) -> list[Answer]:
    """Some at once, with neighbours that are given up in their middle."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, case: Case) -> Answer:
        async with slots:
            if number % 9 == 4:
                request = engine.model.request(case.pictures, "Tell me all.", max_new_tokens=200, ignore_eos=True)
                async with aclosing(engine.answer(Job(request))) as given_up:
                    await anext(given_up)
            return await ask(engine, case)

    return await asyncio.gather(*(one(i, case) for i, case in enumerate(questions)))


def compare(native: QZoom, engine: ServingEngine, runner: asyncio.Runner, questions: list[Case]) -> None:
    wanted = [facts(native.ask(case.pictures, case.question, **case.options)) for case in questions]
    started = time.perf_counter()
    found = [facts(answer) for answer in runner.run(ask_all(engine, questions))]
    seconds = time.perf_counter() - started
    wrong = [(i, own, right) for i, (own, right) in enumerate(zip(found, wanted, strict=True)) if own != right]
    zoomed = sum(one["zoomed"] for one in wanted)
    print(f"{len(wanted) - len(wrong)} of {len(wanted)} equal, {zoomed} zoomed, {len(wanted) / seconds:.1f} a second")
    assert not wrong


@pytest.fixture(scope="module")
def native():
    return read_once(QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu"))


@pytest.fixture(scope="module")
def tiny():
    with vllm("tiny") as found:
        yield found


def test_many_questions_cold_and_from_the_cache(native, tiny):
    questions = cases(COUNT)
    compare(native, *tiny, questions)
    repeated = questions[: COUNT // 6]
    wanted = [facts(native.ask(case.pictures, case.question, **case.options)) for case in repeated]
    again = tiny[1].run(ask_all(tiny[0], repeated))
    assert [facts(answer) for answer in again] == wanted
    assert any(answer.usage.reused_tokens for answer in again)


def test_looks(native, tiny):
    engine, runner = tiny
    for picture in ("receipt.jpg", "delivery-note.jpg"):
        wanted = native.perceive(EXAMPLES / picture, "What is the date?")
        own = runner.run(engine.look(Job(engine.model.request(EXAMPLES / picture, "What is the date?"))))
        assert [region.box for region in own.regions] == [region.box for region in wanted.regions]
        assert own.gate.score == pytest.approx(wanted.gate.score, abs=1e-5)
        assert own.heat_maps[0].values == pytest.approx(wanted.heat_maps[0].values, abs=1e-4)
    assert runner.run(engine.health()) == ""


def test_sampling_ends_and_stop_texts(native, tiny):
    picture = [EXAMPLES / "receipt.jpg"]
    for options in ({"stop": "/0"}, {"max_new_tokens": 3}, {"ignore_eos": True, "max_new_tokens": 40}):
        case = Case(picture, "What is the date?", options)
        wanted = native.ask(picture, case.question, **options)
        assert facts(tiny[1].run(ask(tiny[0], case))) == facts(wanted)
    warm = Case(picture, "What is the date?", {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 7})
    first, second = (tiny[1].run(ask(tiny[0], warm)) for _ in range(2))
    assert first.tokens == second.tokens


def test_short_chunks_and_a_cache_so_small_that_requests_are_preempted(native):
    questions = cases(24)
    long = [
        Case(case.pictures[:1], case.question, {"ignore_eos": True, "max_new_tokens": 120}) for case in questions[:8]
    ]
    with vllm("tiny", max_num_batched_tokens=64, num_gpu_blocks_override=48, max_model_len=1400) as (engine, runner):
        compare(native, engine, runner, [case for pair in zip(long, questions[:8], strict=True) for case in pair])
        compare(native, engine, runner, questions[8:])
        assert sum(m.value for m in get_metrics_snapshot() if m.name == "vllm:num_preemptions") > 0


def test_an_engine_that_was_killed_is_said_to_be_down_and_comes_back(native):
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    with vllm("tiny") as (engine, runner):
        case = Case([EXAMPLES / "receipt.jpg"], "What is the date?", {"ignore_eos": True, "max_new_tokens": 900})

        async def scene() -> None:
            async with aclosing(engine.answer(Job(engine.model.request(case.pictures, case.question)))) as events:
                await anext(events)
                for child in psutil.Process().children(recursive=True):
                    if child.pid not in others:
                        child.kill()
                async for _ in events:
                    pass

        with pytest.raises(EngineDownError, match="has ended; ask again when it is back"):
            runner.run(asyncio.wait_for(scene(), 100))
        with pytest.raises(EngineDownError):
            runner.run(asyncio.wait_for(ask(engine, case), 100))
        assert runner.run(engine.health()) == "engine ended"
        assert engine.running == 0

        async def back() -> None:
            while await engine.health():
                await asyncio.sleep(0.2)

        runner.run(asyncio.wait_for(back(), 200))
        compare(native, engine, runner, cases(2))


def test_core_and_worker_in_one_process(native, monkeypatch):
    """The settings of docs/deploy.md for a CPU."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    with vllm("tiny", distributed_executor_backend="uni") as (engine, runner):
        compare(native, engine, runner, cases(8))
        own = [p for p in psutil.Process().children(recursive=True) if p.pid not in others]
        core = [p for p in own if "VLLM" in " ".join(p.cmdline())]
        assert ["EngineCore" in p.cmdline()[0] for p in core] == [True]


@pytest.mark.parametrize("lost", ["gate", "region"])
def test_checkpoints_without_a_branch(tmp_path, lost):
    folder = copy(find_source("tiny").folder, tmp_path / lost)
    edit_json(folder / "qzoom_config.json", **{lost: False})
    native = read_once(QZoom.from_pretrained(folder, dtype="float32"))
    options = {"zoom": "never"} if lost == "region" else {}
    with vllm(str(folder)) as (engine, runner):
        questions = [Case([EXAMPLES / name], "What is the date?", options) for name in ("receipt.jpg", "scene.png")]
        compare(native, engine, runner, [case for case in questions if case.pictures[0].exists()])


@pytest.mark.parametrize(("family", "ranks"), [("qwen2_5_vl", 1), ("qwen3_vl", 2), ("llava", 1)])
def test_all_families_and_two_ranks(tmp_path, family, ranks, monkeypatch):
    """Random weights: arithmetic only."""
    model = build_model(family, num_attention_heads=2, num_key_value_heads=2)  # heads of 32, the least on CPUs
    if family == "llava":
        backbone = build_backbone(model, llava_tokenizer(), image_processor(family))
        rule = replace(backbone.zoom_defaults()["box"], too_many="none")
        folder = save_pretrained(build_engine(family, backbone=backbone, box=rule), tmp_path / "own", include_base=True)
    else:
        made = build_engine(family, backbone=build_backbone(model, tokenizer(), image_processor(family)))
        folder = write_merged(made, tmp_path / "merged", reuse_src_pos=False)
    native = QZoom.from_pretrained(folder, dtype="float32")
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with vllm(str(folder), tensor_parallel_size=ranks) as (engine, runner):
        options = {"max_new_tokens": 12, "zoom": "always", "region_threshold": 0.01}
        pictures = [EXAMPLES / "receipt.jpg", EXAMPLES / "delivery-note.jpg"]
        compare(
            native,
            engine,
            runner,
            [Case(pictures[:1], "What is the date?", options), Case(pictures, "Which?", options)],
        )


@contextmanager
def vllm_server(*more: str) -> Iterator[str]:
    """`vllm serve $(qzoom vllm-args tiny)` on a free port."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    model, *options = command_line(engine_arguments("tiny", visual_tokens=4096))
    flags = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "2048"]
    # The wheel for CPUs has another name, so that its `vllm` command does not find its version.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options, *flags]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), *more], start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_of_its_own(native):
    front = QZoom(load_engine("tiny", dtype="float32", base_weights=False), "tiny")
    identity = checkpoint_identity(find_source("tiny"))
    with vllm_server() as url:
        engine = RemoteEngine(front, SchedulerLimits(), [url], identity=identity)
        with asyncio.Runner() as runner:
            compare(native, engine, runner, cases(max(12, COUNT // 6)))
            runner.run(engine.close())
        with running(RemoteEngine(front, SchedulerLimits(), [url], identity=identity)) as site:
            body = chat(user(image_part(), "What is the total amount?"), qzoom={"zoom": "always"})
            wanted = native.ask(page(), "What is the total amount?", zoom="always", max_new_tokens=8)
            for stream in (False, True):
                said = httpx.post(f"{site.url}/v1/chat/completions", json=body | {"stream": stream}, timeout=120)
                assert said.status_code == 200
                assert wanted.text in said.text or stream
