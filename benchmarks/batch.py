"""Kill `qzoom batch` at random moments and see whether anything is lost or asked twice; memory on the way.

The undisturbed run comes first; then the same job is killed (SIGKILL) `--kills` times, each when a random number of
lines is written, and finished. Both outputs must hold every question once with the same text, and a line that stood in
the output before a kill must keep its request id.

`--visual-tokens 24 --max-tokens 4` keep 10,000 questions within ten minutes of one core. `--folder` keeps input
and outputs, so that a second call, with `--actors` for example, compares with the same undisturbed output.

Usage: python -m benchmarks.batch [--questions 10000] [--pictures 500] [--kills 10] [--actors 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import psutil

from qzoom.data.synthetic.documents import render_document

_EVERY_S = 2.0


def write_input(folder: Path, args: argparse.Namespace) -> Path:
    """Drawn documents, and shuffled questions about them; the gate lets about a quarter of them zoom."""
    lines: list[dict[str, Any]] = []
    for number in range(args.pictures):
        page = render_document(number)
        picture = folder / f"{number}.png"
        if args.visual_tokens:
            page.image.thumbnail((160, 160))
        page.image.save(picture)
        own = [question.question for question in page.questions]
        for i in range(args.questions // args.pictures + (number < args.questions % args.pictures)):
            controls: dict[str, Any] = {"gate_threshold": 1.0 if i % 4 else 0.0}
            if args.visual_tokens:
                controls["max_visual_tokens"] = args.visual_tokens
            content = [
                {"type": "image_url", "image_url": {"url": picture.resolve().as_uri()}},
                {"type": "text", "text": own[i % len(own)]},
            ]
            messages = [{"role": "user", "content": content}]
            lines.append({"custom_id": f"{number}-{i}", "body": {"messages": messages, "qzoom": controls}})
    random.Random(0).shuffle(lines)
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(source: Path, output: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, so that a kill reaches Ray's processes too."""
    words = ["batch", str(source), "-o", str(output), "--quiet", "--max-tokens", str(args.max_tokens)]
    words += ["--actors", str(args.actors)]
    return subprocess.Popen([sys.executable, "-m", "qzoom", *words], stdout=subprocess.DEVNULL, start_new_session=True)


def run(source: Path, output: Path, args: argparse.Namespace, stop_at: int | None = None) -> list[float]:
    """Run the command, to its end or until so many lines are written, then kill it.

    Returns:
        Resident megabytes of the process and its children, every two seconds.
    """
    process = start(source, output, args)
    own, memory, due = psutil.Process(process.pid), [], 0.0
    while process.poll() is None:
        if stop_at is not None and output.exists() and output.read_bytes().count(b"\n") >= stop_at:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return memory
        if time.monotonic() >= due:
            due = time.monotonic() + _EVERY_S
            with suppress(psutil.Error):
                memory.append(sum(each.memory_info().rss for each in (own, *own.children(recursive=True))) / 2**20)
        time.sleep(0.2)
    assert process.returncode == 0
    return memory


def read(output: Path) -> dict[str, tuple[str, str]]:
    """Request id and text by question."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    found = {
        r["custom_id"]: (r["response"]["request_id"], r["response"]["body"]["choices"][0]["message"]["content"])
        for r in records
    }
    assert len(found) == len(records), "a question was answered twice"
    return found


def complete_lines(output: Path) -> dict[str, str]:
    """Request ids of the lines that are whole now."""
    if not output.exists():
        return {}
    whole = output.read_bytes().rpartition(b"\n")[0]
    records = [json.loads(line) for line in whole.splitlines() if line]
    return {record["custom_id"]: record["response"]["request_id"] for record in records}


def main() -> None:
    """Run, kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--actors", type=int, default=0, help="of Ray Data; 0 runs in process")
    parser.add_argument("--visual-tokens", type=int, default=0, help="most of a question, small pictures; 0: usual")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps input and outputs; else they are thrown away")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(args.folder or Path(name), args), indent=1))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one undisturbed and one killed job."""
    folder.mkdir(parents=True, exist_ok=True)
    source, output = folder / "in.jsonl", folder / "whole.jsonl"
    if not source.exists():
        write_input(folder, args)
    seconds, memory = None, list[float]()
    if len(complete_lines(output)) < args.questions:
        begun = time.monotonic()
        memory = run(source, output, args)
        seconds = round(time.monotonic() - begun, 1)
    killed = folder / f"killed-{args.actors}.jsonl"
    moments = sorted(random.Random(args.seed).sample(range(1, args.questions), args.kills))
    written: dict[str, str] = {}
    for moment in moments:
        run(source, killed, args, moment)
        written |= complete_lines(killed)
    last = run(source, killed, args)
    memory = memory or last
    whole, found = read(output), read(killed)
    half = len(memory) // 2
    return {
        "questions": args.questions,
        "pictures": args.pictures,
        "killed when so many lines were written": moments,
        "actors": args.actors,
        "seconds undisturbed": seconds,
        "written before a kill": len(written),
        "asked again": sum(found[name][0] != request for name, request in written.items()),
        "missing": len(whole.keys() - found.keys()),
        "other texts": sum(whole[name][1] != text for name, (_, text) in found.items()),
        "memory MB": {"first half": round(max(memory[:half])), "second half": round(max(memory[half:]))},
    }


if __name__ == "__main__":
    main()
