"""Times of two methods side by side: questions are asked with both in turn, each alone or in batches."""

from __future__ import annotations

import itertools
import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.evidence import Clock, Line, Look, options_of
from qzoom.store.log import write_atomic

if TYPE_CHECKING:
    from qzoom.data.samples import AnswerRow, Task
    from qzoom.model import QZoom

HEADLINE = "equal-accuracy"
BATCHED = "equal-accuracy-batched"
"""Batches of questions about different pictures."""
SHARED = "equal-accuracy-shared"
"""Batches of questions about the same pictures, whose first look each batch takes once."""
PAIRS = (HEADLINE, BATCHED, SHARED)


@dataclass(frozen=True, slots=True)
class TimeWork:
    """One pair of ways to look.

    Args:
        name: one of `PAIRS`, or the cap that both share.
        task: the questions.
        plain: how the plain model looks.
        zoom: how the zooming one looks at each picture.
        asked: picture and number of each question, in their order.
        path: file of the times.
        longest: most tokens of an answer.
        batch: questions asked at once.
    """

    name: str
    task: Task
    plain: Look
    zoom: Mapping[str, Look]
    asked: tuple[tuple[str, int], ...]
    path: Path
    longest: int = 128
    batch: int = 1

    def groups(self) -> list[tuple[tuple[str, int], ...]]:
        """What is asked at once: questions about pictures that are looked at in one way."""
        by_look: dict[Look, list[tuple[str, int]]] = {}
        for pair in self.asked:
            by_look.setdefault(self.zoom[pair[0]], []).append(pair)
        return [
            tuple(pairs[i : i + self.batch]) for pairs in by_look.values() for i in range(0, len(pairs), self.batch)
        ]

    def header(self, weights: str) -> dict[str, Any]:
        """What decides the times. `weights`: the digest."""
        zoom = {picture: [look.coarse, look.region, look.gate] for picture, look in self.zoom.items()}
        return {
            "plain": self.plain.coarse,
            "longest": self.longest,
            "zoom": zoom,
            "weights": weights,
        } | ({"batch": self.batch} if self.batch > 1 else {})

    def kept(self, weights: str) -> list[dict[str, Any]]:
        """What was timed of this very pair; nothing if the file is of another pair, other limits or weights."""
        lines = _lines(self.path)
        return lines[1:] if lines and lines[0] == self.header(weights) else []

    def begin(self, weights: str) -> list[dict[str, Any]]:
        """Make the file ready for more lines; returns what was timed of this pair before."""
        header, lines = self.header(weights), _lines(self.path)
        if self.path.is_file() and lines[:1] != [header]:
            os.replace(self.path, _free(self.path))
        if lines[:1] != [header]:
            lines = [header]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if not self.path.is_file() or self.path.read_text(encoding="utf-8") != text:
            write_atomic(self.path, text)
        return lines[1:]

    def run(self, model: QZoom, clock: Clock, say: Callable[[str], None] = lambda _: None) -> None:
        """Time what is left; times of another choice stay in a file beside this one.

        Raises:
            OutOfTimeError: between two questions.
        """
        from qzoom.checkpoints.weights import weights_digest

        done = {(line["picture"], line["index"]) for line in self.begin(weights_digest(model.engine))}
        wanted = [group for group in self.groups() if group[0] not in done]
        samples: dict[str, Any] = {}
        for number, group in enumerate(wanted):
            clock.check()
            say(f"times, {self.task.name}, {self.name}: {len(done) + number} of {len(done) + len(wanted)}")
            names = dict.fromkeys(name for name, _ in group)
            samples = {name: samples.get(name) or self.task.sample(self.task.ids.index(name)) for name in names}
            if number == 0:
                self._pair(model, samples, group, swapped=False)  # warm
            took = self._pair(model, samples, group, swapped=(len(done) + number) % 2 == 1)
            picture, index = group[0]
            line = {"picture": picture, "index": index, "load": os.getloadavg()[0], "questions": len(group), **took}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _pair(
        self, model: QZoom, samples: Mapping[str, Any], group: Sequence[tuple[str, int]], *, swapped: bool
    ) -> dict[str, Any]:
        from qzoom.evaluation.methods.base import ask_kwargs

        looks = {"plain": self.plain, "zoom": self.zoom[group[0][0]]}
        asked = [(samples[name].image, samples[name].questions[index].question) for name, index in group]
        out = {}
        for name in reversed(looks) if swapped else looks:
            options = options_of(model, looks[name], self.longest)
            given = ask_kwargs(options.to_engine()) | {"coarse_tokens": options.coarse_tokens}
            start = time.perf_counter()
            answers = [model.ask(*asked[0], **given)] if len(asked) == 1 else model.ask_batch(asked, **given)
            took = time.perf_counter() - start
            decode = answers[0].timing_ms.get("decode", 0.0) / 1000 if len(asked) == 1 else 0.0
            tokens = sum(answer.usage.completion_tokens for answer in answers)
            out[name] = {"s": round(took, 5), "decode_s": round(decode, 5), "tokens": tokens}
        return out


def time_works(
    task: Task,
    plain: Mapping[int, Line],
    zoom: Mapping[int, Line],
    figures: Mapping[str, Any],
    *,
    folder: Path,
    given: Namespace,
) -> list[TimeWork]:
    """The pair of equal accuracy, where there is one, alone and in batches, and the pair of every cap."""
    out = []

    def add(name: str, cap: int, looks: Mapping[str, Look], count: int, batch: int = 1) -> None:
        asked = questions_of(plain[cap].rows, count, together=name != BATCHED)
        path = folder / f"{task.name}-{name}.jsonl"
        out.append(TimeWork(name, task, Look(cap), dict(looks), asked, path, given.max_new_tokens, batch))

    match = figures.get("match")
    if match is not None:
        matched = figures["plain_peak"], zoom[match["cap"]].looks, given.time_questions
        add(HEADLINE, *matched)
        add(BATCHED, *matched, batch=given.time_batch)
        add(SHARED, *matched, batch=given.time_batch)
    for cap, line in zoom.items():
        if cap in plain:
            add(str(cap), cap, line.looks, -(-given.time_questions // 3))
    return out


def questions_of(rows: Sequence[AnswerRow], count: int, *, together: bool = True) -> tuple[tuple[str, int], ...]:
    """The first question about each picture, then the second, until there are enough; then sorted by picture if those
    about a picture shall be `together`."""
    order = {name: i for i, name in enumerate(dict.fromkeys(row.picture for row in rows))}
    turns = sorted(((row.picture, row.index) for row in rows), key=lambda pair: (pair[1], order[pair[0]]))
    return tuple(sorted(turns[:count], key=lambda pair: (order[pair[0]], pair[1])) if together else turns[:count])


def read_times(works: Iterable[TimeWork], weights: str) -> dict[str, dict[str, Any]]:
    """What was timed of these pairs, by the pair's name: ratio of the throughputs and what bounds it.

    Args:
        works: the pairs of one kind of pictures as they are chosen now; times of other ones are left out.
        weights: digest of the model that is reported.
    """
    return {work.name: summary(lines) for work in works if (lines := work.kept(weights))}


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
    questions = sum(line.get("questions", 1) for line in lines)
    return {
        "questions": questions,
        "batch": max(line.get("questions", 1) for line in lines),
        "ratio": float(total[0] / total[1]),
        "interval": [float(side) for side in np.quantile(drawn, [0.025, 0.975])],
        "plain_s": float(total[0] / questions),
        "zoom_s": float(total[1] / questions),
        "plain_decode_s": decode / questions,
        "bound": float(total[0] / decode) if decode else None,
        "load": max(line["load"] for line in lines),
    }


def _free(path: Path) -> Path:
    """The first name beside a file that nothing has yet."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a broken end is left out, an unreadable file is empty."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError:
        return []
