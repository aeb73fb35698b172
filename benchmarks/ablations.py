"""The ablations: the effect of each part of the recipe on the embedded model, beside the paper's results.

    python -m benchmarks.ablations --dry-run
    python -m benchmarks.ablations --minutes 60      # stops after 60 minutes; the same command resumes
    python -m benchmarks.ablations --only K2 K4      # some variants, always with the reference

Labels are made once, from the base's own answers; other labels come from the stored attention. Every variant is one
small training of the region branch (`qzoom train regions`, the recipe of recipes/tiny with fewer steps), a region
threshold chosen on other images, and the answers to the same questions, always zoomed, at two token limits. Gates are
trained on the reference's branch, stage 2 on its hard cases. Everything is stored under RUNS; docs/results/ablations.md
is written from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ablation_train import Bench, plain_base, train_answers, train_gate, train_regions
from benchmarks.ablation_variants import DECISIONS, GATES, REFERENCE, STRATEGIES, THRESHOLDS, Variant, chosen
from benchmarks.ablation_words import write_ablations
from benchmarks.evidence import (
    CALIBRATION_SEED,
    Clock,
    Look,
    OutOfTimeError,
    Work,
    about,
    add_counts,
    ask,
    checked,
    finished,
    kept_run,
    load,
    parser,
    progress,
    run_main,
    tasks_of,
)
from benchmarks.plan import print_ablation_plan
from qzoom.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qzoom.data.samples import AnswerRow, Task
    from qzoom.model import QZoom

LADDER = (16, 36, 64, 100, 144, 288, 400)
"""The lowest levels are included because the answers of a small model change between them, if anywhere."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.set_defaults(kinds=["documents", "scenes"])
    made.add_argument("--only", nargs="+", help=f"names of variants, or {GATES}")
    made.add_argument("--recipes", type=Path, default=Path("recipes/tiny"), help="folder of the stages' recipes")
    made.add_argument("--looks", nargs="+", default=["64+64", "144+144"], help="coarse and region tokens of each limit")
    add_counts(made, 300, 80)
    made.add_argument("--pictures", type=int, default=240, help="synthetic images to label, four questions each")
    made.add_argument("--gate-pictures", type=int, default=400, help="number of images for gate labels")
    made.add_argument("--mine-pictures", type=int, default=150, help="images searched for hard cases (stage 2)")
    made.add_argument("--probe-pictures", type=int, default=20, help="images for the search of attention heads")
    made.add_argument("--heads", default="auto", help="attention heads, as in `qzoom label regions --heads`")
    made.add_argument("--teacher-tokens", type=int, default=400, help="visual tokens of an image for labels")
    made.add_argument(
        "--ladder",
        type=int,
        nargs="+",
        default=[64, 100, 144, 288, 400],
        help="resolutions of the gate labels, in visual tokens",
    )
    made.add_argument("--label-tokens", type=int, default=32, help="maximum number of answer tokens for labels")
    made.add_argument("--steps", type=int, default=300, help="training steps of each region branch")
    made.add_argument("--gate-steps", type=int, default=200)
    made.add_argument("--answer-steps", type=int, default=60)
    made.add_argument("--batch", type=int, default=32)
    given = checked(made.parse_args(arguments))
    given.looks = [_pair(text) for text in given.looks]
    given.train_device = "cpu" if given.device == "auto" else given.device
    known = {variant.name for variant in chosen(None)} | {GATES}
    for name in given.only or ():
        if name not in known:
            raise ConfigError(f"No variant {name!r}; known: {', '.join(sorted(known))}.")
    return given


def _pair(text: str) -> tuple[int, int]:
    coarse, plus, region = text.partition("+")
    if not (plus and coarse.isdigit() and region.isdigit() and int(coarse) and int(region)):
        raise ConfigError(f"{text!r} is no look; write COARSE+REGION such as 64+64.")
    return int(coarse), int(region)


def tasks(given: argparse.Namespace, part: str) -> list[Task]:
    """The questions of "calibration" or "report"."""
    seed, count = (0, given.questions) if part == "report" else (CALIBRATION_SEED, given.calibration_questions)
    return tasks_of(given.kinds, count, given.data, seed, given.limit)


def looking(folder: Path, variant: Variant, threshold: float | None = None, device: str = "cpu") -> QZoom:
    """A trained model with a variant's arithmetic."""
    from qzoom.config import ZoomConfig
    from qzoom.model import QZoom

    engine = QZoom.from_pretrained(folder, device_map=device).engine
    values = engine.config.to_dict()
    values |= variant.zoom | {"box": values["box"] | variant.zoom.get("box", {})}
    if threshold is not None:
        values["region_threshold"] = threshold
    return QZoom(dataclasses.replace(engine, config=ZoomConfig.from_dict(values)), variant.name)


def calibration_works(bench: Bench, variant: Variant, threshold: float) -> Iterator[Work]:
    """The questions that choose a threshold, at the smaller cap."""
    look = Look(*bench.given.looks[0], method="always")
    for task in tasks(bench.given, "calibration"):
        path = bench.root / "variants" / variant.name / "calibration" / f"{task.name}-{threshold:g}.jsonl"
        yield Work(task, look, path, f"{variant.name}, threshold {threshold:g}", bench.given.max_new_tokens)


def report_works(bench: Bench, variant: Variant, look: tuple[int, int]) -> Iterator[Work]:
    """The questions that are reported, at one cap."""
    way = Look(*look, method="always")
    for task in tasks(bench.given, "report"):
        path = bench.root / "variants" / variant.name / "report" / f"{task.name}-{way.name}.jsonl"
        yield Work(task, way, path, variant.name, bench.given.max_new_tokens)


def rows_of(works: Iterator[Work]) -> list[AnswerRow] | None:
    """The answers of several works together; None while one is not finished."""
    runs = [kept_run(work.path, work.task) for work in works]
    return [row for run in runs for row in run.rows] if all(run is not None for run in runs) else None  # type: ignore[union-attr]


def threshold_of(bench: Bench, variant: Variant) -> float | None:
    """The threshold with the most right answers, of equal ones the one nearest to the packaged model's."""
    from qzoom.evaluation.score import row_score

    found = {}
    for threshold in THRESHOLDS:
        rows = rows_of(calibration_works(bench, variant, threshold))
        if rows is None:
            return None
        found[threshold] = sum(row_score(row) for row in rows)
    return min(found, key=lambda threshold: (-found[threshold], abs(threshold - 0.6)))


def trained(bench: Bench, name: str, train: Callable[[], Path]) -> Path | None:
    """The trained model; None where there is nothing to learn from, with a note that says why."""
    note = bench.root / "variants" / name / "note.txt"
    try:
        folder = train()
    except DataError as error:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(error).replace(f"{bench.root}{os.sep}", ""), encoding="utf-8")
        return None
    note.unlink(missing_ok=True)
    return folder


def run_variant(bench: Bench, variant: Variant) -> None:
    """Train, choose the threshold, answer."""
    if variant.answers:
        folder = trained(bench, variant.name, lambda: train_answers(bench))
    else:
        folder = train_regions(bench, variant)
    if folder is None:
        return
    device = bench.given.train_device
    for threshold in THRESHOLDS:
        works = list(calibration_works(bench, variant, threshold))
        if rows_of(iter(works)) is None:
            model = looking(folder, variant, threshold, device)
            for work in works:
                ask(model, work, bench.clock, bench.say)
    model = looking(folder, variant, threshold_of(bench, variant), device)
    for look in bench.given.looks:
        for work in report_works(bench, variant, look):
            ask(model, work, bench.clock, bench.say)


def gate_works(bench: Bench, name: str, look: Look) -> Iterator[Work]:
    """The reported questions, asked of the gate `name`, or of the plain model."""
    for task in tasks(bench.given, "report"):
        path = bench.root / "variants" / name / "report" / f"{task.name}-{look.name}.jsonl"
        yield Work(task, look, path, name, bench.given.max_new_tokens)


def run_gates(bench: Bench) -> None:
    """Train both gates and keep their scores, and those of what may decide in their place.

    A strategy that finds nothing to learn from leaves a note.
    """
    reference = chosen(None)[0]
    threshold = threshold_of(bench, reference)
    model = looking(train_regions(bench, reference), reference, threshold, bench.given.train_device)
    for coarse, _ in bench.given.looks:
        for work in gate_works(bench, REFERENCE, Look(coarse)):
            ask(model, work, bench.clock, bench.say)
    for strategy in STRATEGIES:
        folder = trained(bench, f"gate-{strategy}", lambda name=strategy: train_gate(bench, name))
        if folder is None:
            continue
        model = looking(folder, reference, threshold, bench.given.train_device)
        for coarse, region in bench.given.looks:
            for work in gate_works(bench, f"gate-{strategy}", Look(coarse, region, 0.0)):
                ask(model, work, bench.clock, bench.say)
    for name in DECISIONS:
        other = dataclasses.replace(reference, zoom={"decide_by": name})
        model = looking(train_regions(bench, reference), other, threshold, bench.given.train_device)
        for coarse, region in bench.given.looks:
            for work in gate_works(bench, f"gate-{name}", Look(coarse, region, 0.0)):
                ask(model, work, bench.clock, bench.say)


def found_variants(bench: Bench) -> dict[str, Any]:
    """Variants with their answers at every cap, those that are finished."""
    out: dict[str, Any] = {}
    for variant in chosen(None):
        rows = {look: rows_of(report_works(bench, variant, look)) for look in bench.given.looks}
        if all(found is not None for found in rows.values()):
            out[variant.name] = {"variant": variant, "threshold": threshold_of(bench, variant), "rows": rows}
    return out


def found_gates(bench: Bench) -> dict[str, Any]:
    """For each strategy and decision its scored questions at every cap, or the note that says why there are none."""
    out: dict[str, Any] = {}
    for strategy in (*STRATEGIES, *DECISIONS):
        folder = bench.root / "variants" / f"gate-{strategy}"
        if (folder / "note.txt").is_file():
            out[strategy] = {"note": (folder / "note.txt").read_text(encoding="utf-8")}
            continue
        rows = {}
        for coarse, region in bench.given.looks:
            plain = rows_of(gate_works(bench, REFERENCE, Look(coarse)))
            zoomed = rows_of(gate_works(bench, folder.name, Look(coarse, region, 0.0)))
            if plain is not None and zoomed is not None:
                rows[coarse, region] = (plain, zoomed)
        if len(rows) == len(bench.given.looks):
            out[strategy] = {"rows": rows}
    return out


def every(bench: Bench) -> None:
    """All that was asked for, the reference first."""
    only = bench.given.only
    for variant in chosen(only):
        run_variant(bench, variant)
    if only is None or GATES in only:
        run_gates(bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when all is done, 3 when the time was over first."""
    from qzoom.checkpoints.weights import base_digest

    given = parse(arguments)
    model, _ = load(given.model, given.device)
    root = given.runs / base_digest(model.engine)[:8] / "ablations"
    if given.dry_run:
        print_ablation_plan(model, given, tasks(given, "report"), chosen(given.only))
        return 0
    root.mkdir(parents=True, exist_ok=True)
    bench = Bench(root, plain_base(given.model, root / "base"), given, Clock(given.minutes), progress)
    try:
        every(bench)
        done = True
    except OutOfTimeError:
        done = False
    write_ablations(bench, found_variants(bench), found_gates(bench), about(model))
    return finished(given, "ablations", done=done)


if __name__ == "__main__":
    run_main(main)
