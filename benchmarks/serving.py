"""Load the HTTP server like clients do, and print ratios.

Starts `qzoom serve` on this machine and measures in one run of it:

- throughput of 16 clients with mixed questions (half zoom, every answer 32 tokens) against one client after the other;
- time to the first piece of the answer with 1, 4, 16 and 64 clients, and whether any answer was lost;
- a second question about the same image against the first;
- a question that the gate keeps coarse against one that never zooms;
- with --soak SECONDS: twice the sustainable load, the statuses, the server's memory, and whether answers stayed the
  same.

Usage: python benchmarks/serving.py [--soak 300] [--model M] [--engine vllm] [--results docs/results]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ANSWER_TOKENS = 32
QUESTIONS = ("What is the total amount?", "What is the date?", "What is the company name?", "What is the heading?")


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


@dataclass(slots=True)
class Phase:
    """What a group of clients saw."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return sum(reply.status == 200 for reply in self.replies) / self.seconds


def pictures(count: int, first: int) -> list[str]:
    """Synthetic documents as data URLs."""
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS

    urls = []
    for seed in range(HELD_OUT_SEEDS.start + first, HELD_OUT_SEEDS.start + first + count):
        file = io.BytesIO()
        render_document(seed).image.save(file, "JPEG", quality=85)
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
    reply = Reply(0)
    try:
        async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            reply.status = response.status_code
            if reply.status != 200:
                await response.aread()
                return reply
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _read(reply, json.loads(line[6:]), begin)
    except httpx.HTTPError as error:
        reply.error = type(error).__name__
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


async def crowd(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Phase:
    """These questions, asked by a number of clients that each wait for their answer before they ask again."""
    waiting = list(reversed(bodies))
    phase = Phase()

    async def one(client: httpx.AsyncClient) -> None:
        while waiting:
            phase.replies.append(await ask(client, waiting.pop()))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        phase.seconds = time.perf_counter() - begin
    return phase


async def throughput(url: str, count: int) -> dict[str, Any]:
    """Clients together against one after the other, and the time to the first piece of text. Every phase has pictures
    of its own, so that none finds another's in the cache."""
    rows = []
    for turn, clients in enumerate((1, 4, 16, 64, 16, 1)):
        number = max(count, clients)
        urls = pictures(number, 1000 * turn)
        phase = await crowd(url, [body(picture, i) for i, picture in enumerate(urls)], clients)
        first = sorted(reply.first_s for reply in phase.replies if reply.status == 200)
        rows.append(
            {
                "clients": clients,
                "requests": number,
                "lost": sum(reply.status != 200 or bool(reply.error) for reply in phase.replies),
                "zoomed": sum(reply.zoomed for reply in phase.replies),
                "per_second": phase.per_second,
                "first_p50_s": statistics.median(first),
                "first_p95_s": first[min(len(first) - 1, int(0.95 * len(first)))],
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    def mean(clients: int) -> float:
        return statistics.mean(row["per_second"] for row in rows if row["clients"] == clients)

    return {"rows": rows, "sixteen_over_one": mean(16) / mean(1)}


async def second_question(url: str, count: int) -> dict[str, Any]:
    """Time to the first piece of text of a second question about a picture over that of the first, per way to look."""
    out = {}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for turn, zoom in enumerate(("never", "always", "auto")):
            ratios, cached = [], []
            for picture in pictures(count, 100_000 + 1000 * turn):
                one = await ask(client, body(picture, 0, qzoom={"zoom": zoom}))
                two = await ask(client, body(picture, 1, qzoom={"zoom": zoom}))
                ratios.append(two.first_s / one.first_s)
                cached.append(two.cached)
            out[zoom] = {"ratio": statistics.median(ratios), "cached_tokens": statistics.median(cached)}
    print(json.dumps(out), flush=True)
    return out


async def unzoomed(url: str, count: int) -> dict[str, Any]:
    """What the gate costs where it says no: a question that it keeps coarse against one that never zooms, each about a
    picture of its own, in turn."""
    ways = {"never": {"zoom": "never"}, "gate": {"zoom": "auto", "gate_threshold": 1.0}}
    replies: dict[str, list[Reply]] = {name: [] for name in ways}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for number, picture in enumerate(pictures(2 * count, 200_000)):
            name = list(ways)[number % 2]
            replies[name].append(await ask(client, body(picture, number // 2, qzoom=ways[name])))
    first, whole = (
        statistics.median(getattr(r, part) for r in replies["gate"])
        / statistics.median(getattr(r, part) for r in replies["never"])
        for part in ("first_s", "whole_s")
    )
    zoomed = sum(reply.zoomed for reply in replies["gate"])
    out = {"first_ratio": first, "whole_ratio": whole, "pairs": count, "zoomed": zoomed}
    print(json.dumps(out), flush=True)
    return out


async def soak(url: str, process: psutil.Process, seconds: float) -> dict[str, Any]:
    """Twice as many questions as the server can answer, whatever comes back; greedy answers must stay what they were.

    What it can answer is measured on the same questions, with 16 clients, once its caches hold them.
    """
    urls = pictures(24, 200_000)
    bodies = [body(picture, i) for i, picture in enumerate(urls)]
    calm = await crowd(url, bodies, 1)
    sustainable = (await crowd(url, bodies * 6, 16)).per_second
    rate = 2 * sustainable
    wanted = {json.dumps(b["messages"]): reply.text for b, reply in zip(bodies, calm.replies, strict=True)}
    statuses: Counter[str] = Counter()
    changed, memory, running = 0, [], set()

    async def one(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
        nonlocal changed
        reply = await ask(client, asked)
        statuses[reply.error or str(reply.status)] += 1
        changed += reply.status == 200 and reply.text != wanted[json.dumps(asked["messages"])]

    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        for number in range(int(seconds * rate)):
            due = begin + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one(client, bodies[number % len(bodies)]))
            running.add(task)
            task.add_done_callback(running.discard)
            if time.perf_counter() - begin >= 10 * len(memory):
                memory.append(process.memory_info().rss / 2**20)
        spent = time.perf_counter() - begin
        await asyncio.gather(*running)
    after = [m for i, m in enumerate(memory) if i >= 6] or memory
    return {
        "seconds": spent,
        "sustainable_per_second": sustainable,
        "rate": rate,
        "statuses": dict(statuses),
        "changed_answers": changed,
        "memory_mib": memory,
        "memory_growth_after_a_minute": after[-1] / after[0],
    }


async def measure(url: str, server: subprocess.Popen[str], given: argparse.Namespace) -> dict[str, Any]:
    await crowd(url, [body(picture, i) for i, picture in enumerate(pictures(4, 900_000))], 4)  # warm
    found: dict[str, Any] = {}
    if given.requests:
        found["throughput"] = await throughput(url, given.requests)
        found["second_question"] = await second_question(url, max(4, given.requests // 4))
        found["unzoomed"] = await unzoomed(url, max(4, given.requests // 4))
    if given.soak:
        found["soak"] = await soak(url, psutil.Process(server.pid), given.soak)
        print(json.dumps(found["soak"]), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Serving, embedded model",
        "",
        f"One run of `benchmarks/serving.py {found['words']}` on {found['machine']}; real weights of the embedded "
        "model, float32; speed only. Every phase asks about pictures of its own; half of the questions zoom, every "
        f"answer has {ANSWER_TOKENS} tokens; server and clients share the cores.",
        "",
    ]
    if "throughput" in found:
        lines += _throughput_lines(found)
    if "soak" in found:
        lines += _soak_lines(found["soak"])
    return "\n".join(lines) + "\n"


def _throughput_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "| clients | requests | lost | answers/s | first text p50, s | p95, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["throughput"]["rows"]:
        lines.append(
            f"| {row['clients']} | {row['requests']} | {row['lost']} | {row['per_second']:.2f} | "
            f"{row['first_p50_s']:.2f} | {row['first_p95_s']:.2f} |"
        )
    lines += ["", f"16 clients against one after the other: **{found['throughput']['sixteen_over_one']:.2f}x**.", ""]
    for zoom, row in found["second_question"].items():
        lines.append(
            f"- second question about a picture, zoom {zoom}: first text after **{row['ratio']:.2f}x** of the first's "
            f"time, {row['cached_tokens']:.0f} prompt tokens from the cache"
        )
    row = found["unzoomed"]
    lines.append(
        f"- gate asked, not zoomed, against zoom never ({row['pairs']} pairs): first text "
        f"**{row['first_ratio']:.2f}x**, whole answer **{row['whole_ratio']:.2f}x**"
    )
    return lines


def _soak_lines(run: dict[str, Any]) -> list[str]:
    told = ", ".join(f"{status}: {count}" for status, count in sorted(run["statuses"].items()))
    return [
        "",
        f"{run['seconds']:.0f} s at {run['rate']:.1f} questions a second, twice the "
        f"{run['sustainable_per_second']:.1f} that 16 clients got answered of the same questions just before: {told}; "
        f"{run['changed_answers']} answers changed; memory after the first minute {run['memory_mib'][6]:.0f} MiB, "
        f"at the end {run['memory_mib'][-1]:.0f} MiB.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=48, help="number of questions per phase; 0 for the soak alone")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds at twice the sustainable load; 0 for none")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads of the server")
    parser.add_argument("--engine", default="native", help="of qzoom serve")
    parser.add_argument("--serve", default="", help="more words for qzoom serve, in one argument")
    parser.add_argument("--results", type=Path, help="folder for serving.md and serving.json")
    given = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "qzoom", "serve", "--port", "0", "--model", given.model, "--log-level", "warning"]
    command += ["--engine", given.engine, *given.serve.split()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        found = asyncio.run(measure(url, server, given))
    finally:
        server.terminate()
        server.wait()
    found["words"] = f"--engine {given.engine}"
    found["machine"] = f"{os.cpu_count()} cores ({platform.machine()}), {given.threads} torch threads"
    print(table(found))
    if given.results:
        given.results.mkdir(parents=True, exist_ok=True)
        (given.results / "serving.md").write_text(table(found), encoding="utf-8")
        (given.results / "serving.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
