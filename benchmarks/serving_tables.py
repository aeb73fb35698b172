"""docs/results/serving.md from what `benchmarks/serving.py` measured part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_HEAD = """# Serving, embedded model

Made by `benchmarks/serving.py`, one run per heading; real weights of the embedded model in float32, so speed only.
Server and clients share the cores. Pictures are drawn documents unless said otherwise, each phase has its own, half of
the questions zoom, and every answer has 32 tokens.
"""


def write_results(folder: Path, part: str, engine: str, found: Row) -> None:
    """Add a part of an engine to serving.json, and make serving.md of all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "serving.json"
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    kept.setdefault(part, {})[engine] = dict(found)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (folder / "serving.md").write_text(page(kept), encoding="utf-8")


def page(kept: Mapping[str, Mapping[str, Row]]) -> str:
    """All parts as Markdown."""
    lines = [_HEAD]
    for part, (title, write) in _PARTS.items():
        for engine, found in kept.get(part, {}).items():
            lines += [f"## {title}: {engine}", "", f"`{found['command']}`, {found['machine']}, {found['day']}.", ""]
            lines += [*write(found), ""]
            lines += [found["note"], ""] if "note" in found else []
    return "\n".join(lines)


def _throughput(found: Row) -> list[str]:
    lines = ["| clients | requests | lost | answers/s | first text p50, s | p95, s |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['clients']} | {row['requests']} | {row['lost']} | {row['per_second']:.2f} | "
        f"{row['first_p50_s']:.2f} | {row['first_p95_s']:.2f} |"
        for row in found["rows"]
    ]
    return [*lines, "", f"16 clients against one after the other: **{found['sixteen_over_one']:.2f}x**."]


def _questions(found: Row) -> list[str]:
    lines = [
        f"- second question about a picture, {zoom}: first text after **{row['ratio']:.2f}x** of the first's time, "
        f"{row['cached_tokens']:.0f} prompt tokens from the cache"
        for zoom, row in found["second"].items()
    ]
    if "whole_ratio" in found:
        lines.append(
            f"- gate asked, not zoomed, against never zooming ({found['pairs']} pairs): first text "
            f"**{found['first_ratio']:.2f}x** of {1000 * found['never_first_s']:.0f} ms, whole answer "
            f"**{found['whole_ratio']:.2f}x** of {1000 * found['never_whole_s']:.0f} ms"
        )
    return lines


def _phases(found: Row) -> list[str]:
    lines = ["| phase | clients | requests | lost | zoomed | answers/s |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['clients']} | {row['requests']} | {row['lost']} | {row['zoomed']} | "
        f"{row['per_second']:.2f} |"
        for row in found["rows"]
    ]
    return [*lines, "", f"Ratio of the means: **{found['ratio']:.2f}x**."]


def _soak(found: Row) -> list[str]:
    memory: Sequence[float] = found["memory_mib"]
    return [
        f"{found['seconds']:.0f} s at {found['rate']:.1f} questions a second, twice the "
        f"{found['sustainable_per_second']:.1f} that 16 clients got answered of the same questions just before: "
        f"{_counts(found['statuses'])}; {found['changed_answers']} answers changed; memory that is not shared, of all "
        f"processes: {memory[min(6, len(memory) - 1)]:.0f} MiB after the first minute, {memory[-1]:.0f} MiB at the end."
    ]


def _kill(found: Row) -> list[str]:
    back = found["process_back_s"]
    return [
        f"Eight clients; of {found['processes']} processes one was killed with {found['in_flight']} requests in flight "
        f"in all. Of these failed: {_counts(found['failed_in_flight'])}. Asked afterwards and refused: "
        f"{_counts(found['refused_later'])}; failed before: {found['failed_before']}; answered: {found['answered']}.",
        "",
        f"The first answer to a question asked after the kill came **{_seconds(found['first_answer_s'])}** after it, "
        f"the last refusal {_seconds(found['last_refusal_s'])}, and as many processes as before ran again after "
        f"{_seconds(back)}.",
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


_PARTS: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
    "equal": ("Equal accuracy, scenes: plain at 576 tokens and zooming at 196 (48 + 144, gate 0.9)", _phases),
    "versus": ("Against the native engine", _phases),
    "questions": ("One question after the other", _questions),
    "throughput": ("Throughput", _throughput),
    "replicas": ("Two replicas on Ray Serve and one, one thread each", _phases),
    "soak": ("Twice the capacity", _soak),
    "kill": ("kill -9 under load", _kill),
}
