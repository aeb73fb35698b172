"""Kill `qzoom batch` at random moments and see whether anything is lost or asked twice; memory on the way.

The undisturbed run comes first; then the same job is killed (SIGKILL) `--kills` times and finished. Both outputs must
hold every question once with the same text, and a line that stood in the output before a kill must keep its request id.

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
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import psutil

from qzoom.data.synthetic.documents import render_document

_EVERY_S = 2.0


def write_input(folder: Path, questions: int, pictures: int) -> Path:
    """Drawn documents, and shuffled questions about them."""
    lines: list[dict[str, Any]] = []
    for number in range(pictures):
        page = render_document(number)
        page.image.save(folder / f"{number}.png")
        own = [question.question for question in page.questions]
        count = questions // pictures + (number < questions % pictures)
        lines += [
            {"id": f"{number}-{i}", "image": f"{number}.png", "question": own[i % len(own)]} for i in range(count)
        ]
    random.Random(0).shuffle(lines)
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(source: Path, output: Path, actors: int) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, so that a kill reaches Ray's processes too."""
    words = ["batch", str(source), "-o", str(output), "--max-tokens", "8", "--quiet", "--actors", str(actors)]
    return subprocess.Popen([sys.executable, "-m", "qzoom", *words], stdout=subprocess.DEVNULL, start_new_session=True)


def watch(process: subprocess.Popen[bytes], memory: list[float]) -> None:
    """Resident megabytes of the process and its children, every two seconds."""
    own = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [own, *own.children(recursive=True)]
            memory.append(sum(each.memory_info().rss for each in family) / 2**20)
        except psutil.Error:
            return
        time.sleep(_EVERY_S)


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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_input(folder, args.questions, args.pictures)
        memory: list[float] = []
        begun = time.monotonic()
        process = start(source, folder / "whole.jsonl", args.actors)
        thread = threading.Thread(target=watch, args=(process, memory))
        thread.start()
        assert process.wait() == 0
        thread.join()
        seconds = time.monotonic() - begun
        written: dict[str, str] = {}
        for _ in range(args.kills):
            process = start(source, folder / "killed.jsonl", args.actors)
            try:
                process.wait(draw.uniform(0.1, 1.6) * seconds / args.kills)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            written |= complete_lines(folder / "killed.jsonl")
        assert start(source, folder / "killed.jsonl", args.actors).wait() == 0
        whole, killed = read(folder / "whole.jsonl"), read(folder / "killed.jsonl")
    again = sum(killed[name][0] != request for name, request in written.items())
    half = len(memory) // 2
    record = {
        "questions": args.questions,
        "pictures": args.pictures,
        "kills": args.kills,
        "actors": args.actors,
        "seconds undisturbed": round(seconds, 1),
        "written before a kill": len(written),
        "asked again": again,
        "missing": len(whole.keys() - killed.keys()),
        "other texts": sum(whole[name][1] != text for name, (_, text) in killed.items()),
        "memory MB": {"first half": round(max(memory[:half])), "second half": round(max(memory[half:]))},
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
