"""Load the HTTP server like clients do, and print ratios.

Starts `qzoom serve` on this machine and measures one part at a time; each part's ratios come from one run of it:

- throughput: 16 clients with mixed questions (half zoom, every answer 32 tokens) against one client after the other;
  time to the first piece of the answer with 1, 4, 16 and 64 clients, and whether any answer was lost;
- questions: a second question about the same image against the first, and a question that the gate keeps coarse against
  one that never zooms;
- equal: the plain model at its peak against zooming at the limit of equal accuracy (docs/results/ladder.md, scenes), 16
  clients, every picture asked about once;
- versus: `--engine` against the native engine, the same questions, 16 clients, in turn;
- replicas: two replicas on Ray against one, one thread each, 32 clients;
- soak: `--seconds` at twice the sustainable load, the statuses, memory, and whether answers stayed the same;
- kill: kill -9 of the engine's process (vllm) or of a replica under load.

Usage: python -m benchmarks.serving PART [--engine vllm] [--results docs/results]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serving_tables import write_results

ANSWER_TOKENS = 32
QUESTIONS = ("What is the total amount?", "What is the date?", "What is the company name?", "What is the heading?")
PLAIN_PEAK, ZOOM_SPLIT, ZOOM_GATE = 576, (48, 144), 0.9
VLLM = (
    "--limit", "visual_tokens=4096", "--engine-option", "enforce_eager=true", "--engine-option", "max_model_len=4096",
    "--engine-option", "distributed_executor_backend=uni",
)  # fmt: skip
"""A picture of 16,384 tokens takes minutes to try out at the start on a CPU, and so does compilation. With a worker of
its own (mp), the engine's core waits for it in a loop that takes a processor."""


@dataclass(slots=True)
class Reply:
    """One request's fate; times in seconds from when it was sent."""

    status: int
    text: str = ""
    zoomed: bool = False
    cached: int = 0
    first_s: float = 0.0
    whole_s: float = 0.0
    error: str = ""
    sent: float = 0.0  # on the performance counter


@dataclass(slots=True)
class Phase:
    """What a group of clients saw."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return sum(reply.status == 200 and not reply.error for reply in self.replies) / self.seconds


@dataclass(frozen=True, slots=True)
class Server:
    """A running `qzoom serve`."""

    url: str
    process: psutil.Process

    def family(self, word: str = "") -> list[psutil.Process]:
        """The process and its children, or those of them whose command line holds a word."""
        found = []
        for one in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.Error):
                if word in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def memory_mib(self) -> float:
        """Memory that is not shared, of all processes."""
        total = 0
        for one in self.family():
            with suppress(psutil.Error):
                used = one.memory_info()
                total += used.rss - used.shared
        return total / 2**20


@contextmanager
def serving(given: argparse.Namespace, *words: str, engine: str = "", model: str = "") -> Iterator[Server]:
    """A server with these words behind the usual ones."""
    engine = engine or given.engine
    threads = str(given.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM turns uni into mp on a CPU
    command = [sys.executable, "-m", "qzoom", "serve", "--port", "0", "--model", model or given.model]
    command += ["--served-model-name", "tiny", "--log-level", "error", "--dtype", "float32", "--engine", engine]
    command += [*(VLLM if engine == "vllm" else ()), *given.serve.split(), *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        yield Server(server.stdout.readline().split()[-1], psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait()


def pictures(count: int, first: int, kind: str = "document", side: int = 0) -> list[str]:
    """Synthetic documents or scenes as data URLs, shrunk to a longest side in pixels unless that is 0."""
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS
    from qzoom.data.synthetic.scenes import render_scene

    urls = []
    for seed in range(HELD_OUT_SEEDS.start + first, HELD_OUT_SEEDS.start + first + count):
        file, image = io.BytesIO(), (render_scene if kind == "scene" else render_document)(seed).image
        if side:
            image.thumbnail((side, side))
        image.save(file, "JPEG", quality=85)
        urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def body(picture: str, number: int, **more: Any) -> dict[str, Any]:
    """A question; every second one zooms."""
    parts = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "qzoom": {"zoom": "always" if number % 2 else "never"},
        **more,
    }


async def ask(client: httpx.AsyncClient, asked: dict[str, Any]) -> Reply:
    """Send one question and read its stream."""
    begin = time.perf_counter()
    reply = Reply(0, sent=begin)
    try:
        async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            reply.status = response.status_code
            if reply.status != 200:
                reply.error = str(json.loads(await response.aread())["error"]["code"])
                return reply
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _read(reply, json.loads(line[6:]), begin)
    except httpx.HTTPError as error:
        reply.error = type(error).__name__
    finally:
        reply.whole_s = time.perf_counter() - begin
    return reply


def _read(reply: Reply, chunk: dict[str, Any], begin: float) -> None:
    if "error" in chunk:
        reply.error = str(chunk["error"].get("code"))
        return
    if chunk.get("usage"):
        reply.cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if "qzoom" in delta:
            reply.zoomed = delta["qzoom"]["gate"]["zoomed"]
        if delta.get("content"):
            reply.first_s = reply.first_s or time.perf_counter() - begin
            reply.text += delta["content"]


async def ask_whole(client: httpx.AsyncClient, asked: bytes) -> Reply:
    """Send one encoded question and read its answer, which comes as one."""
    begin = time.perf_counter()
    response = await client.post("/v1/chat/completions", content=asked, headers={"Content-Type": "application/json"})
    seconds = time.perf_counter() - begin
    reply = Reply(response.status_code, first_s=seconds, whole_s=seconds, sent=begin)
    if reply.status != 200:
        reply.error = str(response.json()["error"]["code"])
        return reply
    message = response.json()["choices"][0]["message"]
    reply.text, reply.zoomed = message["content"], message["qzoom"]["gate"]["zoomed"]
    return reply


async def crowd(url: str, bodies: Sequence[dict[str, Any] | bytes], clients: int) -> Phase:
    """These questions, asked by a number of clients that each wait for their answer before they ask again."""
    waiting = list(reversed(bodies))
    phase = Phase()

    async def one(client: httpx.AsyncClient) -> None:
        while waiting:
            asked = waiting.pop()
            phase.replies.append(await (ask_whole if isinstance(asked, bytes) else ask)(client, asked))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        phase.seconds = time.perf_counter() - begin
    return phase


def rated(name: str, bodies: Sequence[dict[str, Any] | bytes], url: str, clients: int) -> dict[str, Any]:
    """One phase as a row."""
    phase = asyncio.run(crowd(url, bodies, clients))
    row = {
        "name": name,
        "clients": clients,
        "requests": len(bodies),
        "lost": sum(reply.status != 200 or bool(reply.error) for reply in phase.replies),
        "zoomed": sum(reply.zoomed for reply in phase.replies),
        "per_second": phase.per_second,
    }
    print(json.dumps(row), flush=True)
    return row | {"firsts": sorted(reply.first_s for reply in phase.replies if reply.status == 200)}


def ratio(rows: Sequence[dict[str, Any]], above: str, below: str) -> float:
    """Answers a second of the phases of one name over those of another."""
    one, other = (statistics.mean(r["per_second"] for r in rows if r["name"] == name) for name in (above, below))
    return one / other


def warm(server: Server) -> None:
    """A few questions before anything is measured."""
    bodies = [body(picture, i) for i, picture in enumerate(pictures(4, 900_000))]
    asyncio.run(crowd(server.url, bodies, 4))


def throughput(given: argparse.Namespace) -> dict[str, Any]:
    """Clients together against one after the other, and the time to the first piece of text. Every phase has pictures
    of its own, so that none finds another's in the cache."""
    rows = []
    with serving(given) as server:
        warm(server)
        for turn, clients in enumerate((1, 4, 16, 64, 16, 1)):
            urls = pictures(max(given.requests, clients), 1000 * turn)
            row = rated(str(clients), [body(url, i) for i, url in enumerate(urls)], server.url, clients)
            first = row.pop("firsts")
            row |= {"first_p50_s": statistics.median(first), "first_p95_s": first[int(0.95 * (len(first) - 1))]}
            rows.append(row)
    return {"rows": rows, "sixteen_over_one": ratio(rows, "16", "1")}


def questions(given: argparse.Namespace) -> dict[str, Any]:
    """A second question about a picture, and one that the gate keeps coarse, asked one after the other."""
    with serving(given) as server:
        warm(server)
        return asyncio.run(_questions(server.url, given.requests))


async def _questions(url: str, count: int) -> dict[str, Any]:
    second, ways = {}, {"never": {"zoom": "never"}, "gate": {"zoom": "auto", "gate_threshold": 1.0}}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for turn, (zoom, control) in enumerate((*ways.items(), ("always", {"zoom": "always"}))):
            pairs = [
                [await ask(client, body(picture, i, qzoom=control)) for i in range(2)]
                for picture in pictures(count, 100_000 + 1000 * turn)
            ]
            ratios = [two.first_s / one.first_s for one, two in pairs]
            cached = statistics.median(two.cached for _, two in pairs)
            second[zoom] = {"ratio": statistics.median(ratios), "cached_tokens": cached, "pairs": count}
        replies: dict[str, list[Reply]] = {name: [] for name in ways}
        for number, picture in enumerate(pictures(2 * count, 200_000)):
            name = list(ways)[(number + number // 2) % 2]
            replies[name].append(await ask(client, body(picture, number // 2, qzoom=ways[name])))
    out: dict[str, Any] = {"second": second, "pairs": count, "zoomed": sum(r.zoomed for r in replies["gate"])}
    for part in ("first_s", "whole_s"):
        gate, never = (statistics.median(getattr(r, part) for r in replies[name]) for name in ("gate", "never"))
        out |= {f"{part[:-2]}_ratio": gate / never, f"never_{part}": never}
    return out


def equal(given: argparse.Namespace) -> dict[str, Any]:
    """Plain at its peak and zooming at the limit at which it is as accurate, in turn, every scene asked about once."""
    from qzoom.checkpoints.hub import find_source

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(find_source(given.model).folder, folder)
        path = folder / "qzoom_config.json"
        config = json.loads(path.read_text())
        for view, most in zip(("coarse_tokens", "region_tokens"), ZOOM_SPLIT, strict=True):
            config["zoom"][view] = {"min_tokens": min(most, config["zoom"][view]["min_tokens"]), "max_tokens": most}
        path.write_text(json.dumps(config))
        ways = {
            "plain": {"zoom": "never", "max_visual_tokens": PLAIN_PEAK},
            "zoom": {"zoom": "auto", "gate_threshold": ZOOM_GATE},
        }
        rows = []
        phases = [
            [
                body(url, i, qzoom=ways[way], ignore_eos=False, max_tokens=16)
                for i, url in enumerate(pictures(given.requests, 1000 * turn, "scene"))
            ]
            for turn, way in enumerate(("plain", "zoom") * 2)
        ]
        with serving(given, model=str(folder)) as server:
            warm(server)
            for way, bodies in zip(("plain", "zoom") * 2, phases, strict=True):
                rows.append(rated(way, bodies, server.url, 16))
    return {"rows": rows, "ratio": ratio(rows, "zoom", "plain")}


def versus(given: argparse.Namespace) -> dict[str, Any]:
    """The engine against the native one; the idle one's memory is all it takes."""
    phases = [
        [body(url, i) for i, url in enumerate(pictures(given.requests, 300_000 + 1000 * turn))] for turn in range(2)
    ]
    rows = []
    with serving(given) as own, serving(given, engine="native") as native:
        for server in (own, native):
            warm(server)
        for turn, order in enumerate(((own, native), (native, own))):
            for server in order:
                rows.append(rated(given.engine if server is own else "native", phases[turn], server.url, 16))
    return {"rows": rows, "ratio": ratio(rows, given.engine, "native")}


def replicas(given: argparse.Namespace) -> dict[str, Any]:
    """Two replicas against one, in turn. Pictures have 640 px, bodies are encoded before, and answers come as one, so
    that clients and front end, which share the cores, need little themselves."""

    def encoded(first: int, count: int) -> list[bytes]:
        whole = {"stream": False, "stream_options": None}
        urls = pictures(count, first, side=640)
        return [json.dumps(body(url, i, **whole)).encode() for i, url in enumerate(urls)]

    rows = []
    for turn, count in enumerate((1, 2, 1, 2)):
        bodies = encoded(400_000 + 1000 * turn, given.requests)
        with serving(given, "--replicas", str(count)) as server:
            for first in (900_000, 900_500):
                asyncio.run(crowd(server.url, encoded(first, 16), 16))
            rows.append(rated(str(count), bodies, server.url, 32))
    return {"rows": rows, "ratio": ratio(rows, "2", "1")}


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """Twice as many questions as the server can answer, whatever comes back; greedy answers must stay what they were.

    What it can answer is measured on the same questions, with 16 clients, once its caches hold them.
    """
    with serving(given) as server:
        bodies = [body(picture, i) for i, picture in enumerate(pictures(24, 200_000))]
        calm = asyncio.run(crowd(server.url, bodies, 1))
        sustainable = asyncio.run(crowd(server.url, bodies * 4, 16)).per_second
        return asyncio.run(_soak(server, bodies, calm, sustainable, given.seconds))


async def _soak(
    server: Server, bodies: Sequence[dict[str, Any]], calm: Phase, sustainable: float, seconds: float
) -> dict[str, Any]:
    rate = 2 * sustainable
    wanted = {json.dumps(b["messages"]): reply.text for b, reply in zip(bodies, calm.replies, strict=True)}
    statuses: Counter[str] = Counter()
    changed, memory, running = 0, [], set()

    async def one(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
        nonlocal changed
        reply = await ask(client, asked)
        statuses[str(reply.status) if reply.status != 200 else reply.error or "200"] += 1
        changed += reply.status == 200 and reply.text != wanted[json.dumps(asked["messages"])]

    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        for number in range(int(seconds * rate)):
            due = begin + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one(client, bodies[number % len(bodies)]))
            running.add(task)
            task.add_done_callback(running.discard)
            if time.perf_counter() - begin >= 10 * len(memory):
                memory.append(server.memory_mib())
        spent = time.perf_counter() - begin
        await asyncio.gather(*running)
    return {
        "seconds": spent,
        "sustainable_per_second": sustainable,
        "rate": rate,
        "statuses": dict(statuses),
        "changed_answers": changed,
        "memory_mib": memory,
    }


def kill(given: argparse.Namespace) -> dict[str, Any]:
    """kill -9 of what answers while eight clients ask; who is refused asks again half a second later."""
    word = "ServeReplica:qzoom:engine" if "--replicas" in given.serve else "VLLM::EngineCore"
    bodies = [body(picture, i) for i, picture in enumerate(pictures(24, 500_000))]
    with serving(given) as server:
        warm(server)
        return asyncio.run(_kill(server, bodies, word, given.seconds))


async def _kill(server: Server, bodies: Sequence[dict[str, Any]], word: str, seconds: float) -> dict[str, Any]:
    replies: list[Reply] = []
    end = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient, first: int) -> None:
        number = first
        while time.perf_counter() < end:
            replies.append(await ask(client, bodies[number % len(bodies)]))
            number += 1
            if replies[-1].status != 200 or replies[-1].error:
                await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        tasks = [asyncio.create_task(one(client, 3 * i)) for i in range(8)]
        await asyncio.sleep(seconds / 6)
        before = server.family(word)
        dead, killed = before[0], time.perf_counter()
        dead.kill()
        back = None
        while time.perf_counter() < end:
            await asyncio.sleep(0.5)
            if back is None and len([p for p in server.family(word) if p.pid != dead.pid]) == len(before):
                back = time.perf_counter() - killed
        await asyncio.gather(*tasks)
    bad = [r for r in replies if r.status != 200 or r.error]
    good = [r.sent + r.whole_s - killed for r in replies if r not in bad and r.sent > killed]
    flying = [r for r in replies if r.sent <= killed < r.sent + r.whole_s]
    return {
        "processes": len(before),
        "answered": len(replies) - len(bad),
        "in_flight": len(flying),
        "failed_in_flight": dict(Counter(r.error for r in flying if r in bad)),
        "refused_later": dict(Counter(f"{r.status} {r.error}" for r in bad if r.sent > killed)),
        "failed_before": sum(r.sent + r.whole_s <= killed for r in bad),
        "first_answer_s": min(good, default=None),
        "last_refusal_s": max((r.sent + r.whole_s - killed for r in bad), default=0.0),
        "process_back_s": back,
    }


PARTS = {f.__name__: f for f in (throughput, questions, equal, versus, replicas, soak, kill)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=48, help="number of questions per phase")
    parser.add_argument("--seconds", type=float, default=300.0, help="of soak and kill")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of the server")
    parser.add_argument("--engine", default="native", help="of qzoom serve")
    parser.add_argument("--serve", default="", help="more words for qzoom serve, in one argument")
    parser.add_argument("--results", type=Path, help="folder for serving.md and serving.json")
    given = parser.parse_args()
    found = PARTS[given.part](given)
    for row in found.get("rows", ()):
        row.pop("firsts", None)
    words = [given.part, "--engine", given.engine, *([f"--serve '{given.serve}'"] if given.serve else [])]
    found |= {
        "command": f"python -m benchmarks.serving {' '.join(words)}",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), {given.threads} torch threads",
        "day": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(found))
    if given.results:
        name = f"{given.engine}{', replicas' if '--replicas' in given.serve else ''}"
        write_results(given.results, given.part, name, found)


if __name__ == "__main__":
    main()
