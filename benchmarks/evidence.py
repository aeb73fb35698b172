"""Common parts of the benchmark programs: token limits, tasks, a time limit, and stored answers that a rerun resumes.

Everything is stored under RUNS/WEIGHTS, where WEIGHTS is a digest of the model's weights, so other weights get a folder
of their own. `ladder`, `baselines` and `ablations` ask; `results` reads the stored answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import ConfigError, QZoomError

if TYPE_CHECKING:
    from qzoom.data.samples import AnswerRow, Task
    from qzoom.evaluation.report_figures import Run
    from qzoom.model import QZoom

CAPS = (64, 100, 144, 196, 288, 400, 576, 768, 1024)
KINDS = ("scenes", "documents", "receipts")
PER_PICTURE = {"scenes": 10, "documents": 19.5}
"""Questions about a drawn picture, rounded down: how many pictures a number of questions takes."""
CALIBRATION_SEED = 500_000
"""Drawn pictures from here on choose settings; those from 0 on are reported."""


class OutOfTimeError(Exception):
    """The minutes of this call are spent; what was done is kept."""


class Clock:
    """Ends a call in good time.

    Args:
        minutes: from now; None never ends.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Between two pieces of work, both of which are kept.

        Raises:
            OutOfTimeError: the time is over.
        """
        if self._end is not None and time.monotonic() >= self._end:
            raise OutOfTimeError


@dataclass(frozen=True, slots=True)
class Look:
    """One way to look.

    Args:
        coarse: most visual tokens of the coarse view.
        region: most visual tokens of the regions; 0 is the plain model.
        gate: zoom at this score; None takes the checkpoint's own.
        method: see `qzoom.evaluation.methods`.
    """

    coarse: int
    region: int = 0
    gate: float | None = None
    method: str = "qzoom"

    @property
    def cap(self) -> int:
        """Most visual tokens of a question."""
        return self.coarse + self.region

    @property
    def name(self) -> str:
        """As a part of a file's name."""
        if not self.region:
            return f"plain-{self.coarse}"
        gate = "" if self.gate is None else f"-gate-{self.gate:g}"
        return f"{self.method}-{self.coarse}+{self.region}{gate}"

    @property
    def words(self) -> str:
        """For people."""
        return f"≤ {self.coarse}" + (f" + {self.region}" if self.region else "")


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A model at one cap.

    Args:
        rows: the answers.
        run: one whose sizes and method give their operations.
        looks: how each picture was looked at.
    """

    rows: tuple[AnswerRow, ...]
    run: Run
    looks: Mapping[str, Look]

    @property
    def words(self) -> str:
        """The limits, each once."""
        return ", ".join(dict.fromkeys(look.words for look in self.looks.values()))

    @property
    def gates(self) -> str:
        """The gate thresholds, each once."""
        gates = dict.fromkeys(look.gate for look in self.looks.values())
        return ", ".join("always" if not gate else f"{gate:g}" for gate in gates)


@dataclass(frozen=True, slots=True)
class Work:
    """One set of questions to be asked in one way.

    Args:
        task: the questions.
        look: the way.
        path: file of the answers.
        part: for the plan.
        longest: most tokens of an answer.
    """

    task: Task
    look: Look
    path: Path
    part: str
    longest: int = 128

    def left(self) -> int:
        """Pictures that are not answered yet."""
        return len(self.task.ids) - len({row.picture for row in kept_rows(self.path)} & set(self.task.ids))


def kept_rows(path: Path) -> tuple[AnswerRow, ...]:
    """Answers that were kept; none without a file."""
    from qzoom.data.samples import read_answers

    return tuple(read_answers(path)[1]) if path.is_file() else ()


def kept_run(path: Path, task: Task | None = None) -> Run | None:
    """A run as reports take it; None while it, or the part about the task's pictures, is not finished."""
    from qzoom.evaluation.report_figures import Run, read_run

    if not kept_rows(path):
        return None
    run = read_run(path)
    if task is None:
        return run
    rows = tuple(row for row in run.rows if row.picture in set(task.ids))
    return Run(path, run.about, run.settings, rows) if len({r.picture for r in rows}) == len(task.ids) else None


def tasks_of(kinds: Sequence[str], questions: int, data: Path | None, seed: int, limit: int | None) -> list[Task]:
    """The tasks of kinds of pictures; receipts only where their folder is named.

    Args:
        kinds: of `KINDS`.
        questions: at least so many about drawn pictures of each kind.
        data: folder of the receipts.
        seed: number of the first drawn picture.
        limit: most pictures of each kind.
    """
    from qzoom.data.benchmarks.registry import open_task

    out: list[Task] = []
    for kind in kinds:
        if kind == "receipts":
            if data is not None:
                receipts = open_task(kind, data=data, split="dev")
                out.append(dataclasses.replace(receipts, ids=receipts.ids[:limit]))
            continue
        count = math.ceil(questions / PER_PICTURE[kind])
        out.append(open_task(kind, seed=seed, count=count if limit is None else min(count, limit)))
    return out


def options_of(model: QZoom, look: Look, max_new_tokens: int = 128) -> Any:
    """The evaluation's options for a way to look."""
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.runner import EvalOptions

    zoom: Any = "auto" if look.region else "never"
    default = model.engine.backbone.default_budget()
    limits = share_tokens(zoom, model.config, default, coarse=look.coarse, region=look.region or None)
    return EvalOptions(zoom, *limits, gate_threshold=look.gate, max_new_tokens=max_new_tokens, method=look.method)


def ask(model: QZoom, work: Work, clock: Clock, say: Callable[[str], None] = lambda _: None) -> list[AnswerRow]:
    """Answer what is left of a set of questions.

    Raises:
        OutOfTimeError: after a picture, when the time is over and pictures are left.
    """
    from qzoom.evaluation.runner import run

    def check(done: int, total: int) -> None:
        say(f"{work.part}, {work.task.name}, {work.look.words} ({work.look.method}): {done} of {total} pictures")
        if done < total:
            clock.check()

    return run(model, work.task, options_of(model, work.look, work.longest), output=work.path, on_picture=check)


def progress(text: str) -> None:
    """One line that is written over, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def load(name: str, device: str = "auto") -> tuple[QZoom, str]:
    """A model and the first eight digits of its weights' digest."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from qzoom.checkpoints.weights import weights_digest
    from qzoom.cli.options import ModelOptions

    model = ModelOptions(name, None, device).load()
    return model, weights_digest(model.engine)[:8]


def about(model: QZoom) -> dict[str, Any]:
    """What ran, for the reader."""
    import torch

    from qzoom.evaluation.runner import describe_model, describe_software

    found = describe_software(model) | describe_model(model) | {"threads": torch.get_num_threads()}
    return {key: value for key, value in found.items() if key not in ("config", "shape")}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all evidence programs have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="tiny", help="embedded model, folder or hub id")
    made.add_argument("--data", type=Path, help="folder of the scanned receipts; without it they are skipped")
    made.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of images")
    made.add_argument("--max-new-tokens", type=int, default=128, help="maximum number of tokens of an answer")
    made.add_argument("--limit", type=int, help="use only the first N images of each kind")
    made.add_argument("--minutes", type=float, help="stop after N minutes; the same command resumes")
    made.add_argument("--dry-run", action="store_true", help="print the runs and an estimate of their time")
    made.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the stored answers")
    made.add_argument("--results", type=Path, default=Path("docs/results"), help="folder for the tables")
    made.add_argument("--device", default="auto", help="cpu, cuda or auto")
    return made


def add_counts(made: argparse.ArgumentParser, questions: int, calibration: int | None = None) -> None:
    """The options that say how many synthetic questions are asked, with these defaults."""
    made.add_argument("--questions", type=int, default=questions, help="number of test questions per synthetic dataset")
    if calibration is not None:
        made.add_argument(
            "--calibration-questions",
            type=int,
            default=calibration,
            help="number of calibration questions per synthetic dataset",
        )


def checked(given: argparse.Namespace) -> argparse.Namespace:
    """The parsed options, refused where they contradict each other.

    Raises:
        ConfigError: no kind of pictures is left, or a number below one.
    """
    if given.kinds == ["receipts"] and given.data is None:
        raise ConfigError("The receipts need --data FOLDER.")
    for name in ("limit", "minutes", "time_batch"):
        value = getattr(given, name, None)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
    return given


def finished(given: argparse.Namespace, name: str, *, done: bool) -> int:
    """Say whether a page is complete; the program's exit status, 3 when the same command has to be run again."""
    state = "is complete." if done else "is not complete; run the same command again."
    print(f"\n{given.results / name}.md {state}")
    return 0 if done else 3


def run_main(main: Callable[[], int]) -> None:
    """Run a program; what goes wrong is one sentence."""
    try:
        sys.exit(main())
    except QZoomError as error:
        sys.exit(str(error))
