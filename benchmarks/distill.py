"""Throughput of the distillation pipeline with images of 8 megapixels, and whether memory grows with their number.

Makes images once (stored for the next call), then runs propose to export with rules in every role, so that only the
pipeline itself is measured: decoding, hashing, selecting, storing, writing Parquet. Each case is a separate process;
memory is the sum of the proportional shares (PSS) of the process and all its children, sampled every half second.

Usage: python benchmarks/distill.py [--counts 250 1000] [--engines inprocess ray] [--folder DIR] [--results DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 3264, 2448
PLACES = 4
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Case:
    """One measured run; memory in MiB, time in seconds, `cpu_seconds` of all processes together."""

    engine: str
    pictures: int
    seconds: float
    pictures_per_second: float
    cpu_seconds: float
    rows: int
    peak_mib: float
    peak_main_mib: float
    stored_mib: float


def make_pictures(folder: Path, count: int) -> Path:
    """Pictures with tagged boxes and a question file; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        boxes = [(200 + 700 * n + int(rng.integers(60)), 300 + 500 * n, 160, 70) for n in range(PLACES)]
        path = folder / f"{number:05d}.jpg"
        if not path.exists():
            _draw(path, number, boxes)
        for place, (x, y, width, height) in enumerate(boxes):
            question = f"Which code is printed on tag {place} of sheet {number}?"
            entry = {"id": f"{number}-{place}", "image": path.name, "question": question}
            lines.append({**entry, "answer": f"C{number}-{place}", "boxes": [[x, y, x + width, y + height]]})
    questions = folder / f"questions-{count}.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return questions


def _draw(path: Path, number: int, boxes: list[tuple[int, int, int, int]]) -> None:
    """A smooth ground of this picture's own with white tags, written whole or not at all."""
    from qzoom.store.log import atomic_path

    rng = np.random.default_rng(number)
    ground = Image.fromarray(rng.integers(60, 200, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    draw = ImageDraw.Draw(ground)
    for place, (x, y, width, height) in enumerate(boxes):
        draw.rectangle((x, y, x + width, y + height), fill="white")
        draw.text((x + 10, y + 20), f"C{number}-{place}", fill="black", font_size=24)
    with atomic_path(path) as partial:
        ground.save(partial, "JPEG", quality=90)


def recipe_text(questions: Path, engine: str) -> str:
    """The recipe of a case, as YAML (which JSON is)."""
    values = {
        "pictures": [str(questions)],
        "roles": {"teachers": [{"by": "rule", "name": "a"}, {"by": "rule", "name": "b"}]},
        "engine": engine,
        "workers": 2,
        "ray": {"actors": 2, "threads": 1},
    }
    return json.dumps(values)


class Watch(threading.Thread):
    """Samples the memory and the CPU time of a process and its children until they end."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._main = psutil.Process(pid)
        self._ended = threading.Event()
        self._cpu: dict[int, float] = {}
        self.peak = self.peak_main = 0.0

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            total = 0.0
            try:
                family = [self._main, *self._main.children(recursive=True)]
            except psutil.Error:
                return
            for process in family:
                try:
                    share = process.memory_full_info().pss / 2**20
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                total += share
                self._cpu[process.pid] = times.user + times.system
                if process.pid == self._main.pid:
                    self.peak_main = max(self.peak_main, share)
            self.peak = max(self.peak, total)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def measure(engine: str, count: int, pictures: Path, work: Path) -> Case:
    """Run the command on the first pictures and watch it."""
    questions = make_pictures(pictures, count)
    recipe, out = work / "recipe.yaml", work / f"{engine}-{count}"
    recipe.write_text(recipe_text(questions, engine))
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "qzoom", "distill", str(recipe), "-o", str(out), "--json", "--quiet"]
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    said, _ = process.communicate()
    seconds = time.monotonic() - began
    watch.stop()
    if process.returncode:
        raise SystemExit(f"The run with {engine} failed.")
    rows = sum(json.loads(said.splitlines()[-1])["rows"].values())
    stored = sum(path.stat().st_size for path in (out / "steps").iterdir()) / 2**20
    shutil.rmtree(out)
    return Case(engine, count, seconds, count / seconds, watch.cpu_seconds, rows, watch.peak, watch.peak_main, stored)


def report(cases: list[Case]) -> str:
    """The cases as a page."""
    lines = [
        "# Throughput and memory of the distillation pipeline",
        "",
        f"Pictures of {WIDTH} x {HEIGHT} px (8 megapixels, JPEG) with {PLACES} questions each, through propose to",
        "export with rules in every role, so without the time that real teachers take. Time is that of the whole",
        "command, start of Python and of Ray included. Memory is the peak of the proportional shares (PSS) of the",
        "command and all its processes; CPU seconds are those of all of them.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; made by",
        "`python benchmarks/distill.py --results docs/results`.",
        "",
        "| Engine | Pictures | Seconds | Pictures per second | CPU seconds | Rows | Peak MiB | main process, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        lines.append(
            f"| {case.engine} | {case.pictures} | {case.seconds:.1f} | {case.pictures_per_second:.2f} | "
            f"{case.cpu_seconds:.0f} | {case.rows} | {case.peak_mib:.0f} | {case.peak_main_mib:.0f} |"
        )
    for engine in dict.fromkeys(case.engine for case in cases):
        own = sorted((case for case in cases if case.engine == engine), key=lambda case: case.pictures)
        if len(own) > 1:
            growth = (own[-1].peak_mib - own[0].peak_mib) / (own[-1].pictures - own[0].pictures) * 1000
            lines += ["", f"{engine}: {growth:+.0f} KiB of peak memory per further picture."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--engines", nargs="+", default=["inprocess", "ray"], choices=["inprocess", "ray"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qzoom-distill-benchmark")
    parser.add_argument("--results", type=Path, help="Folder for distill.md and distill.json.")
    options = parser.parse_args()
    cases = []
    for engine in options.engines:
        for count in options.counts:
            case = measure(engine, count, options.folder / "pictures", options.folder)
            cases.append(case)
            print(json.dumps(asdict(case)), flush=True)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "distill.md").write_text(report(cases))
        (options.results / "distill.json").write_text(json.dumps([asdict(case) for case in cases], indent=2) + "\n")
    print(report(cases))


if __name__ == "__main__":
    main()
