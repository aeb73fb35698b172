"""PDFs: which page the embedded model reads, what time and memory pages cost, and what broken files come to.

    python -m benchmarks.pdf --output runs/pdf [--documents 200] [--model tiny]

Documents of 1, 5 and 20 pages are drawn from held-out seeds and bound into PDFs of pictures; one question each can be
answered from one page only (no other page has the same question). The model always zooms. Page hit: the region lies on
that page; box hit: it also holds the middle of an answer box. Chance reads any page. Each document is asked twice: with
the shared coarse budget, and with the whole coarse budget for every page. The run can be stopped and goes on with the
same weights and number of documents only.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import machine
from qzoom import QZoom
from qzoom.data.synthetic.documents import render_document
from qzoom.data.synthetic.page import HELD_OUT_SEEDS, SyntheticSample
from qzoom.errors import QZoomError
from qzoom.evaluation.runner import describe_model
from qzoom.evaluation.tables import write_figures
from qzoom.images.limits import ImageLimits
from qzoom.images.load import load_pictures
from qzoom.scoring.intervals import bootstrap, interval_of
from qzoom.store.log import LogWriter

PAGES = {1: 0.3, 5: 0.5, 20: 0.2}  # share of the documents
ARMS = ("shared", "whole")
FUZZED = 30
SECONDS = 10.0  # limit of a fuzzed file
_DPI = 200
_DRAW = """
import resource, sys
from qzoom.images.limits import ImageLimits
from qzoom.images.pdf import draw_pages
draw_pages(sys.stdin.buffer.read(), "file", ImageLimits())
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def compose(number: int, pages: int) -> tuple[list[SyntheticSample], int, int]:
    """Pages of one document, which of them is asked about, and which of its questions.

    Every page's seed is of this document alone.
    """
    draw = random.Random(number)
    seeds = iter(HELD_OUT_SEEDS[10_000 + 100 * number :])
    while True:
        target = render_document(next(seeds), reword=False)
        asked = [i for i, q in enumerate(target.questions) if q.boxes and q.boxes[0] != (0, 0, *target.image.size)]
        if asked:
            break
    chosen = draw.choice(asked)
    text, others = target.questions[chosen].question, []
    kinds = [kind for kind in ("receipt", "form", "table") if kind != target.kind]
    while len(others) < pages - 1:
        other = render_document(next(seeds), kind=draw.choice(kinds), reword=False)
        if all(question.question != text for question in other.questions):
            others.append(other)
    at = draw.randrange(pages)
    return [*others[:at], target, *others[at:]], at, chosen


def bind(samples: Sequence[SyntheticSample]) -> bytes:
    """A PDF of pictures."""
    out = io.BytesIO()
    first, *rest = [sample.image for sample in samples]
    dates = {"creationDate": time.gmtime(0), "modDate": time.gmtime(0)}  # the same bytes every time
    first.save(out, "PDF", save_all=True, append_images=rest, resolution=_DPI, **dates)
    return out.getvalue()


def ask(model: QZoom, number: int, pages: int) -> list[dict[str, Any]]:
    """One document, asked in both arms."""
    samples, at, chosen = compose(number, pages)
    data, question = bind(samples), samples[at].questions[chosen]
    begin = time.perf_counter()
    drawn = list(load_pictures(data))
    drawing_s = time.perf_counter() - begin
    most = (model.config.coarse_tokens or model.engine.backbone.default_budget()).max_tokens
    rows = []
    for arm in ARMS:
        budget = None if arm == "shared" else (64, most * pages)
        begin = time.perf_counter()
        answer = model.ask(drawn, question.question, zoom="always", max_new_tokens=24, coarse_tokens=budget)
        region = next(iter(answer.regions), None)
        page_hit = region is not None and region.page == at + 1
        rows.append(
            {
                "arm": arm,
                "pages": pages,
                "page_hit": page_hit,
                "box_hit": bool(page_hit and region and _holds(region.box, samples[at], chosen, drawn[at].size_px)),
                "zoomed": answer.gate.zoomed,
                "right": answer.text.strip().casefold() == question.answer.casefold(),
                "coarse_tokens": answer.usage.coarse_tokens,
                "drawing_s": round(drawing_s, 4),
                "answering_s": round(time.perf_counter() - begin, 4),
            }
        )
    return rows


def _holds(box: Sequence[int], sample: SyntheticSample, chosen: int, size_px: tuple[int, int]) -> bool:
    """Whether a box on the drawn page holds the middle of an answer box of the sheet."""
    across, down = (drawn / own for drawn, own in zip(size_px, sample.image.size, strict=True))
    for x0, y0, x1, y1 in sample.questions[chosen].boxes:
        x, y = (x0 + x1) / 2 * across, (y0 + y1) / 2 * down
        if box[0] <= x < box[2] and box[1] <= y < box[3]:
            return True
    return False


def fuzzed(number: int) -> bytes:
    """A broken file made of a good one: cut off, bytes changed, pieces taken out, put in twice or exchanged."""
    draw = random.Random(1000 + number)
    data = bytearray(bind([render_document(HELD_OUT_SEEDS[50 + i], reword=False) for i in range(1 + number % 3)]))
    way, at = number % 5, draw.randrange(20, len(data))
    length = draw.randrange(1, 2000)
    if way == 0:
        return bytes(data[:at])
    if way == 1:
        for _ in range(draw.choice([5, 50, 500])):
            data[draw.randrange(8, len(data))] = draw.randrange(256)
    elif way == 2:
        del data[at : at + length]
    elif way == 3:
        data[at:at] = data[at : at + length]
    else:
        for word in (b"/Count 1", b"/Length", b"/Width", b"/MediaBox", b"/Kids"):
            if draw.random() < 0.5:
                place = data.find(word)
                data[place + len(word) : place + len(word) + 4] = draw.choice(
                    [b" -9 ", b" 99999999 ", b" 3 0 R ", b"[[[["]
                )
    return bytes(data)


def read_fuzzed(number: int) -> dict[str, Any]:
    """What a broken file comes to: pages read, or the sentence; an exception of another kind ends the run."""
    data, begin = fuzzed(number), time.perf_counter()
    try:
        outcome: dict[str, Any] = {"read": len(load_pictures(data, ImageLimits(max_seconds=SECONDS)))}
    except QZoomError as error:
        outcome = {"refused": str(error)}
    return outcome | {"seconds": round(time.perf_counter() - begin, 3)}


def memory(model_name: str, pages: int) -> dict[str, float]:
    """Peak memory of a process that asks about one document, and of the process that draws its pages, in MB."""
    command = [sys.executable, "-m", "benchmarks.pdf", "--model", model_name, "--peak", str(pages), "--output", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    # A process counts what its parent had when it was started, so a small one starts the one that draws.
    data = bind(compose(7, pages)[0])
    drawing = subprocess.run([sys.executable, "-c", _DRAW], input=data, capture_output=True, check=True)
    return values | {"drawing_process": round(int(drawing.stdout) / 1024)}


def peak(model_name: str, pages: int) -> dict[str, float]:
    """See `memory`; runs in the process of its own."""
    model = QZoom.from_pretrained(model_name)
    model.ask(render_document(HELD_OUT_SEEDS[0]).image, "?", max_new_tokens=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = bind(compose(7, pages)[0])
    after_drawing = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.ask(data, "What is the date?", zoom="always", max_new_tokens=8)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model_and_one_picture": round(before / 1024),
        "with_the_file_made": round(after_drawing / 1024),
        "after_the_answer": round(after / 1024),
    }


def plan(documents: int) -> Iterator[tuple[int, int]]:
    """Number and pages of every document, sizes mixed so that a stopped run has some of each."""
    sizes = [pages for pages, share in PAGES.items() for _ in range(round(documents * share))]
    random.Random(0).shuffle(sizes)
    yield from enumerate(sizes)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per arm and number of pages."""
    out = []
    for pages in PAGES:
        for arm in ARMS:
            own = [row for row in rows if (row["pages"], row["arm"]) == (pages, arm)]
            if not own:
                continue
            hits, count = sum(row["page_hit"] for row in own), len(own)
            scores = np.array([[float(row["page_hit"]) for row in own]])
            low, high = interval_of(bootstrap(scores, [str(i) for i in range(count)], 0)[0])
            mean = {name: sum(row[name] for row in own) / count for name in ("box_hit", "right", "coarse_tokens")}
            times = {name: sorted(row[name] for row in own)[count // 2] for name in ("drawing_s", "answering_s")}
            out.append(
                {"pages": pages, "arm": arm, "documents": count, "page_hit": hits / count, "low": low, "high": high}
                | {"chance": 1 / pages}
                | mean
                | times
            )
    return out


def report(record: dict[str, Any]) -> str:
    """The page of results."""
    facts = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    model = f"`{record['model']}` (weights `{record['weights']}`, {record['dtype']})"
    lines = [
        "# PDFs",
        "",
        "Documents of drawn pages, one question each that one page can answer; the embedded model always zooms. It was",
        "trained on single pages: the figures show what sharing a coarse budget does, not what a large model can do.",
        "`shared`: all pages share the coarse budget of one picture, at least 64 tokens each; `whole`: each has it.",
        f"Model {model}. Made by `python -m benchmarks.pdf`; {facts}.",
        "",
        "| pages | budget | documents | page hit | 95 % | chance | box hit | exact | coarse tokens | drawing s "
        "| answering s |",
        "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['pages']} | {row['arm']} | {row['documents']} | {row['page_hit']:.2f} | {row['low']:.2f} to "
            f"{row['high']:.2f} | {row['chance']:.2f} | {row['box_hit']:.2f} | {row['right']:.2f} | "
            f"{row['coarse_tokens']:.0f} | {row['drawing_s']:.2f} | {row['answering_s']:.2f} |"
        )
    lines += ["", "Times are medians. Peak memory in MB:", "", "| pages | model and one picture | with the file made |"]
    lines[-1] += " after the answer | drawing process |"
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for pages, values in record["memory"].items():
        lines.append(f"| {pages} | " + " | ".join(str(value) for value in values.values()) + " |")
    fuzz = record["fuzzed"]
    lines += [
        "",
        f"Of {fuzz['files']} files fuzzed from good ones {fuzz['read']} were read and {fuzz['refused']} refused in one "
        f"sentence; the slowest took {fuzz['slowest_s']:.2f} s (limit {SECONDS:.0f} s), none crashed.",
    ]
    return "\n".join(lines) + "\n"


def open_log(folder: Path, model: QZoom, documents: int) -> LogWriter:
    """What was measured; `about` says on which machine.

    Raises:
        ConfigError: it is of other weights, other arithmetic or another number of documents, whose sizes are mixed
            otherwise.
    """
    settings = {"documents": documents, "model": describe_model(model)}
    path, advice = folder / "documents.jsonl", "name another folder with --output"
    return LogWriter(path, "pdf-benchmark", settings, about=machine("cpu"), advice=advice)


def run(model_name: str, folder: Path, documents: int) -> dict[str, Any]:
    """Measure what is missing and put everything together."""
    model = QZoom.from_pretrained(model_name, dtype="float32", device_map="cpu")
    with open_log(folder, model, documents) as log:
        for number in range(FUZZED):
            if f"fuzzed-{number}" not in log:
                log.append(f"fuzzed-{number}", [read_fuzzed(number)])
        for pages in PAGES:
            if f"peak-{pages}" not in log:
                log.append(f"peak-{pages}", [memory(model_name, pages)])
        for number, pages in plan(documents):
            if f"document-{number}" not in log:
                log.append(f"document-{number}", ask(model, number, pages))
        items, facts, used = dict(log), log.about, log.settings["model"]
    rows = [row for key, found in items.items() if key.startswith("document-") for row in found]
    broken = [found[0] for key, found in items.items() if key.startswith("fuzzed-")]
    return {
        "benchmark": "pdf",
        "model": model_name,
        **{name: used[name] for name in ("weights", "dtype", "device", "attention")},
        "documents": documents,
        "machine": facts,
        "rows": summarise(rows),
        "memory": {str(pages): items[f"peak-{pages}"][0] for pages in PAGES},
        "fuzzed": {
            "files": len(broken),
            "read": sum("read" in item for item in broken),
            "refused": sum("refused" in item for item in broken),
            "slowest_s": max(item["seconds"] for item in broken),
        },
    }


def main() -> None:
    """Measure; write the record and its page into the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.model, args.peak)))
        return
    record = run(args.model, args.output, args.documents)
    text = report(record)
    write_figures(args.output, "pdf", record, text)
    print(text)


if __name__ == "__main__":
    main()
