"""Seconds of two ways to look, side by side: each question is asked both ways, in turn, each time alone."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.evidence import Clock, Look, options_of

if TYPE_CHECKING:
    from benchmarks.ladder_figures import Line
    from qzoom.evaluation.records import AnswerRow, Task
    from qzoom.model import QZoom

HEADLINE = "equal-accuracy"


@dataclass(frozen=True, slots=True)
class TimeWork:
    """One pair of ways to look.

    Args:
        name: `HEADLINE`, or the cap that both share.
        task: the questions.
        plain: how the plain model looks.
        zoom: how the zooming one looks at each picture.
        asked: picture and number of each question, those about a picture together.
        path: file of the times.
        longest: most tokens of an answer.
    """

    name: str
    task: Task
    plain: Look
    zoom: Mapping[str, Look]
    asked: tuple[tuple[str, int], ...]
    path: Path
    longest: int = 128

    def header(self, model: QZoom) -> dict[str, Any]:
        """What decides the times."""
        from qzoom.evaluation.identity import weights_digest

        zoom = {picture: [look.coarse, look.region, look.gate] for picture, look in self.zoom.items()}
        return {
            "plain": self.plain.coarse,
            "longest": self.longest,
            "zoom": zoom,
            "weights": weights_digest(model.engine),
        }

    def run(self, model: QZoom, clock: Clock, say: Callable[[str], None] = lambda _: None) -> None:
        """Time what is left; times of another choice are thrown away.

        Raises:
            OutOfTimeError: between two questions.
        """
        header = self.header(model)
        lines = _lines(self.path)
        if not lines or lines[0] != header:
            lines = [header]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        done = {(line["picture"], line["index"]) for line in lines[1:]}
        wanted = [pair for pair in self.asked if pair not in done]
        sample = None
        for number, (picture, index) in enumerate(wanted):
            clock.check()
            say(f"times, {self.task.name}, {self.name}: {len(done) + number} of {len(done) + len(wanted)} questions")
            if sample is None or sample.id != picture:
                sample = self.task.sample(self.task.ids.index(picture))
                if number == 0:
                    self._pair(model, sample, index, swapped=False)  # warm
            took = self._pair(model, sample, index, swapped=(len(done) + number) % 2 == 1)
            line = {"picture": picture, "index": index, "load": os.getloadavg()[0], **took}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _pair(self, model: QZoom, sample: Any, index: int, *, swapped: bool) -> dict[str, Any]:
        looks = {"plain": self.plain, "zoom": self.zoom[sample.id]}
        out = {}
        for name in reversed(looks) if swapped else looks:
            options = options_of(model, looks[name], self.longest)
            given = options.of_question() | {"coarse_tokens": options.coarse_tokens}
            start = time.perf_counter()
            answer = model.ask(sample.image, sample.questions[index].question, **given)
            took = time.perf_counter() - start
            decode = answer.timing_ms.get("decode", 0.0) / 1000
            out[name] = {"s": round(took, 5), "decode_s": round(decode, 5), "tokens": answer.usage.completion_tokens}
        return out


def time_works(
    task: Task,
    plain: Mapping[int, Line],
    zoom: Mapping[int, Line],
    figures: Mapping[str, Any],
    folder: Path,
    given: Namespace,
) -> list[TimeWork]:
    """The pair of equal accuracy, where there is one, and the pair of every cap."""
    out = []

    def add(name: str, cap: int, looks: Mapping[str, Look], count: int) -> None:
        asked = questions_of(plain[cap].rows, count)
        path = folder / f"{task.name}-{name}.jsonl"
        out.append(TimeWork(name, task, Look(cap), dict(looks), asked, path, given.max_new_tokens))

    match = figures.get("match")
    if match is not None:
        add(HEADLINE, figures["plain_peak"], zoom[match["cap"]].looks, given.time_questions)
    for cap, line in zoom.items():
        if cap in plain:
            add(str(cap), cap, line.looks, -(-given.time_questions // 3))
    return out


def questions_of(rows: Sequence[AnswerRow], count: int) -> tuple[tuple[str, int], ...]:
    """The first question about each picture, then the second, until there are enough; sorted by picture."""
    order = {name: i for i, name in enumerate(dict.fromkeys(row.picture for row in rows))}
    turns = sorted(((row.picture, row.index) for row in rows), key=lambda pair: (pair[1], order[pair[0]]))
    return tuple(sorted(turns[:count], key=lambda pair: (order[pair[0]], pair[1])))


def read_times(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """What was timed of a kind of pictures, by the pair's name: ratio of the throughputs and what bounds it."""
    out = {}
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        lines = _lines(path)[1:]
        if lines:
            out[path.stem.removeprefix(f"{kind}-")] = summary(lines)
    return out


def summary(lines: list[dict[str, Any]], draws: int = 2000) -> dict[str, Any]:
    """The ratio of all seconds, its interval over pictures, and the most that a free look would reach."""
    import numpy as np

    names = list(dict.fromkeys(line["picture"] for line in lines))
    seconds = np.zeros((2, len(names)))
    for line in lines:
        seconds[:, names.index(line["picture"])] += line["plain"]["s"], line["zoom"]["s"]
    weights = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    drawn = (weights @ seconds[0]) / (weights @ seconds[1])
    total = seconds.sum(1)
    decode = sum(line["plain"]["decode_s"] for line in lines)
    return {
        "questions": len(lines),
        "ratio": float(total[0] / total[1]),
        "interval": [float(side) for side in np.quantile(drawn, [0.025, 0.975])],
        "plain_s": float(total[0] / len(lines)),
        "zoom_s": float(total[1] / len(lines)),
        "plain_decode_s": decode / len(lines),
        "bound": float(total[0] / decode) if decode else None,
        "load": max(line["load"] for line in lines),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a broken end is left out, an unreadable file is empty."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError:
        return []
