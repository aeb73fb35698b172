"""`qzoom eval coverage`: whether a model's attention falls where the answer is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.boxed_data import QUESTIONS, Data, Source, open_boxed
from qzoom.cli.console import Console
from qzoom.cli.eval import Count, DataRevision, Limit, Seed, Split

if TYPE_CHECKING:
    from qzoom.evaluation.coverage import Coverage
    from qzoom.model import QZoom

__all__ = ["coverage"]

MaxVisualTokens = Annotated[
    int | None,
    typer.Option(
        min=1, show_default="the checkpoint's coarse look", help="Most visual tokens of the look at the picture."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", show_default=False, help="Folder for coverage.json, every question, and the plot."),
]
Compare = Annotated[
    Path | None,
    typer.Option(show_default=False, help="Folder of another run: differences to it, by pairs, with intervals."),
]


def coverage(
    task: Source = QUESTIONS,
    data: Data = None,
    split: Split = None,
    data_revision: DataRevision = None,
    seed: Seed = None,
    count: Count = None,
    limit: Limit = None,
    model: options.Model = "tiny",
    max_visual_tokens: MaxVisualTokens = None,
    output: Output = None,
    compare: Compare = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure how much attention falls on the answer's place.

    The question's attention is divided by that of a request to describe the picture. Lift is the share of it inside the
    place over the place's share of the picture, 1 is chance. Layer and head are chosen on half of the pictures and
    reported on the other half.

    Example: qzoom eval coverage scenes --count 20 -o out/coverage
    """
    from qzoom.evaluation.coverage import compare_coverage, read_coverage
    from qzoom.evaluation.tables import coverage_lines

    console = Console(quiet=quiet)
    opened = open_boxed(task, data, split, data_revision, seed, count)
    other = None if compare is None else read_coverage(compare)
    console.hush_libraries()
    from qzoom.cli.loading import load_model

    reader = load_model(model, revision, device, dtype)
    found = _measure(reader, opened, max_visual_tokens, limit, console)
    about = opened.identity | {"model": reader.name, "max_visual_tokens": max_visual_tokens}
    difference = None if other is None else compare_coverage(found.to_dict(), other)
    if output is not None:
        _write(found, about, output, console)
    if json:
        extra = {} if difference is None else {"compare": difference}
        console.record(about | found.to_dict(rows=False) | extra)
        return
    for line in coverage_lines(found, difference):
        console.result(line)


def _measure(reader: QZoom, opened: Any, most: int | None, limit: int | None, console: Console) -> Coverage:
    from qzoom.cli.eval_output import progress
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.coverage import measure_coverage
    from qzoom.evaluation.coverage_maps import question_maps

    coarse, _ = share_tokens("never", reader.config, reader.engine.backbone.default_budget(), total=most)
    with progress(console, f"{opened.name}, attention") as bar:
        found = measure_coverage(question_maps(reader, opened, coarse, limit=limit, on_picture=bar))
    if found.errors:
        console.note(f"{found.errors} questions could not be asked and are in no figure.")
    return found


def _write(found: Coverage, about: dict[str, Any], folder: Path, console: Console) -> None:
    import json

    from qzoom.evaluation.tables import plot_coverage

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | found.to_dict(), ensure_ascii=False, allow_nan=False)
    (folder / "coverage.json").write_text(text + "\n", encoding="utf-8")
    console.note(f"saved   {plot_coverage(found, folder / 'coverage.png')}")
