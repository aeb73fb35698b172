"""The distilled student: base and student on the same held-out images, in every view.

    python -m benchmarks.r2i --student weights/tiny-r2i --distilled runs/distill/tiny-teachers --data RECEIPTS

Asks both models about the whole image, the cropped region, the marked image and with zooming at the main token limit
(`qzoom eval zoomgap`), and about the whole image and with zooming at the other limits, and measures where the attention
goes (`qzoom eval coverage`). Writes docs/results/r2i.md. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.evidence import (
    Clock,
    OutOfTimeError,
    about,
    add_counts,
    checked,
    finished,
    load,
    parser,
    run_main,
    tasks_of,
)
from benchmarks.r2i_words import write_r2i
from qzoom.errors import ConfigError
from qzoom.evaluation.zoom_views import VIEWS, GapSettings, View

if TYPE_CHECKING:
    from qzoom.data.samples import Task
    from qzoom.evaluation.zoomgap import Rows
    from qzoom.model import QZoom

SIDES = ("base", "student")


@dataclass(frozen=True, slots=True)
class Part:
    """One set of pictures at one cap.

    Args:
        task: pictures and questions.
        settings: the views.
        folder: of the kept answers.
    """

    task: Task
    settings: GapSettings
    folder: Path

    def kept(self) -> Rows | None:
        """The answers; None while some are missing."""
        from qzoom.evaluation.zoomgap import enters_gap, read_views

        if not (self.folder / "full.jsonl").is_file():
            return None
        rows, _ = read_views(self.folder)
        full = rows["full"]
        placed = sum(enters_gap(row) for row in full)
        wanted = {view: placed if view in ("region", "boxed") else len(full) for view in self.settings.views}
        complete = {row.picture for row in full} == set(self.task.ids)
        complete &= all(len(rows.get(view, ())) == count for view, count in wanted.items())
        return rows if complete else None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--student", required=True, help="folder of the trained model")
    made.add_argument("--distilled", type=Path, help="run of `qzoom distill` behind the student, for its counts")
    made.add_argument("--cap", type=int, default=288, help="visual tokens of all four views and of the attention")
    made.add_argument("--caps", type=int, nargs="*", default=[144, 576], help="further limits, full and zoom view only")
    add_counts(made, 1000)
    made.add_argument("--coverage", type=int, default=40, help="images of each kind for the attention coverage")
    made.add_argument("--zoom", choices=("auto", "always"), default="auto", help="zoom mode of the zoom view")
    made.add_argument("--no-boxed", action="store_true", help="skip the marked image, the slowest view")
    made.add_argument("--crop-scale", type=float, default=1.0, help="factor by which crops are enlarged")
    made.add_argument("--crop-min-px", type=int, default=224, help="minimum side of a region in pixels")
    given = checked(made.parse_args(arguments))
    if given.cap in given.caps:
        raise ConfigError(f"--caps must not name {given.cap} again.")
    return given


def parts(given: argparse.Namespace, root: Path) -> Iterator[Part]:
    """All sets, the main cap first."""
    for cap in (given.cap, *given.caps):
        views: tuple[View, ...] = ("full", "zoom")
        if cap == given.cap:
            views = tuple(view for view in VIEWS if view != "boxed" or not given.no_boxed)
        settings = GapSettings(
            views, cap, given.crop_scale, 0.1, given.crop_min_px, zoom=given.zoom, max_new_tokens=given.max_new_tokens
        )
        for task in tasks_of(given.kinds, given.questions, given.data, 0, given.limit):
            yield Part(task, settings, root / "gap" / f"{task.name}-{cap}-{given.zoom}")


def covered_tasks(given: argparse.Namespace) -> list[Task]:
    """The pictures whose attention is measured."""
    most = given.coverage if given.limit is None else min(given.coverage, given.limit)
    return tasks_of(given.kinds, given.questions, given.data, 0, most)


def coverage_file(given: argparse.Namespace, root: Path, task: Task) -> Path:
    """Where a kind's attention figures are kept."""
    return root / "coverage" / f"{task.name}-{given.cap}" / "coverage.json"


def coverage_request(given: argparse.Namespace, task: Task, ran: dict[str, Any]) -> dict[str, Any]:
    """What decides a kind's attention figures, as JSON values. `ran`: what `about` says of the model."""
    model = {name: ran[name] for name in ("weights", "dtype", "device", "attention")}
    wanted = {"questions": task.identity, "pictures": task.ids, "max_visual_tokens": given.cap, "model": model}
    found: dict[str, Any] = json.loads(json.dumps(wanted))
    return found


def kept_coverage(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """A kind's attention figures; None without any, or if they are of other pictures, limits or weights."""
    from qzoom.evaluation.coverage import read_coverage

    found = read_coverage(path) if path.is_file() else {}
    return found if found.get("asked") == asked else None


def ask_all(given: argparse.Namespace, root: Path, model: QZoom, clock: Clock) -> None:
    """Ask what is not kept yet.

    Raises:
        OutOfTimeError: the time is over and something is left.
    """
    from qzoom.evaluation.zoomgap import ask_views

    def check(done: int, total: int) -> None:
        if done < total:
            clock.check()

    for part in parts(given, root):
        ask_views(model, part.task, part.settings, output=part.folder, progress=lambda _: check)
    for task in covered_tasks(given):
        path, asked = coverage_file(given, root, task), coverage_request(given, task, about(model))
        if kept_coverage(path, asked) is None:
            clock.check()
            _measure_coverage(given, model, task, path)


def _measure_coverage(given: argparse.Namespace, model: QZoom, task: Task, path: Path) -> None:
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.coverage import measure_coverage, question_maps
    from qzoom.store.log import write_atomic

    looks, _ = share_tokens("never", model.config, model.engine.backbone.default_budget(), total=given.cap)
    found = measure_coverage(question_maps(model, task, looks))
    asked = coverage_request(given, task, about(model))
    write_atomic(path, json.dumps({"asked": asked} | found.to_dict()))


def figures_of(given: argparse.Namespace, roots: dict[str, Path], ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is finished for both sides: per kind the gap at every cap, and the attention."""
    from qzoom.evaluation.coverage import compare_coverage
    from qzoom.evaluation.zoomgap import compare_gaps, measure_gap

    out: dict[str, Any] = {}
    for base, student in zip(*(parts(given, roots[side]) for side in SIDES), strict=True):
        sides = [part.kept() for part in (base, student)]
        if sides[0] is None or sides[1] is None:
            continue
        found = {side: measure_gap(rows) for side, rows in zip(SIDES, sides, strict=True) if rows}
        found["difference"] = compare_gaps(sides[1], sides[0])
        out.setdefault(base.task.name, {"caps": {}})["caps"][base.settings.max_visual_tokens] = found
    for task in covered_tasks(given):
        before, after = (
            kept_coverage(coverage_file(given, roots[side], task), coverage_request(given, task, ran[side]))
            for side in SIDES
        )
        if before is not None and after is not None:
            out.setdefault(task.name, {"caps": {}})["attention"] = compare_coverage(after, before)
    return out


def data_of(folder: Path | None) -> dict[str, Any]:
    """What `qzoom distill` reported; nothing without its folder.

    Raises:
        ConfigError: the folder has no report.
    """
    if folder is None:
        return {}
    path = folder / "report.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--distilled: {path} cannot be read ({error}); name a run of `qzoom distill`.") from error
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when all is done, 3 when the time was over first."""
    given = parse(arguments)
    data, clock, roots, ran = data_of(given.distilled), Clock(given.minutes), {}, {}
    done = True
    for side, name in zip(SIDES, (given.model, given.student), strict=True):
        model, digest = load(name, given.device)
        roots[side], ran[side] = given.runs / digest / "r2i", about(model)
        try:
            ask_all(given, roots[side], model, clock)
        except OutOfTimeError:
            done = False
    write_r2i(given, ran, data, figures_of(given, roots, ran))
    return finished(given, "r2i", done=done)


if __name__ == "__main__":
    run_main(main)
