"""`qzoom calibrate`: thresholds for a wanted operating point, from the user's own questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.evaluation.calibrate import Calibration

__all__ = ["calibrate"]

ShareZoomed = Annotated[
    float | None, typer.Option(min=0, max=1, show_default=False, help="Wish: this share of questions zooms.")
]
LatencyMs = Annotated[
    float | None, typer.Option(min=0, show_default=False, help="Wish: at most this long per question, on average.")
]
MaxLoss = Annotated[
    float | None, typer.Option(min=0, max=1, show_default=False, help="Wish: lose no more than this share.")
]
RegionThresholds = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", show_default=False, help="Compare these too (questions with answers)."),
]


def calibrate(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="JSONL file, one question a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the adapter with the chosen thresholds.")],
    share_zoomed: ShareZoomed = None,
    latency_ms: LatencyMs = None,
    max_accuracy_loss: MaxLoss = None,
    confidence: Annotated[float, typer.Option(min=0, max=1, help="Of the loss's bound and of the intervals.")] = 0.95,
    region_thresholds: RegionThresholds = None,
    confidence_gates: Annotated[
        bool,
        typer.Option("--confidence-gates", help="Also make the methods margin and entropy zoom as often as the gate."),
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder for the answers; another wish then asks nothing.")
    ] = None,
    date: Annotated[str | None, typer.Option(show_default=False, help="Noted in the adapter's provenance.")] = None,
    model: options.Model = "tiny",
    coarse_tokens: options.CoarseTokens = None,
    region_tokens: options.RegionTokens = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    json: options.Json = False,
    quiet: options.Quiet = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Choose the gate's and the region map's threshold for one wish, and write the model with them to --output.

    Every question is asked twice: from the coarse look, and zoomed. With answers in the file, accuracy is measured
    against them; without, the zoomed answer is the reference. A loss is bounded exactly, with the stated confidence,
    as if the questions were drawn independently, and refused where they are too few for it.

    Example: qzoom calibrate questions.jsonl --share-zoomed 0.3 -o calibrated
    """
    import dataclasses

    from qzoom.checkpoints.adapter import save_pretrained
    from qzoom.checkpoints.writing import check_target
    from qzoom.cli.loading import load_model
    from qzoom.data.questions import read_calibration_questions
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.calibrate import CalibrationGoal
    from qzoom.evaluation.calibrate import calibrate as run
    from qzoom.evaluation.runner import EvalOptions

    goal = CalibrationGoal(share_zoomed, latency_ms, max_accuracy_loss, confidence)
    coarse = options.parse_tokens(coarse_tokens, "--coarse-tokens")
    region = options.parse_tokens(region_tokens, "--region-tokens")
    asked = read_calibration_questions(questions)
    check_target(output, "adapter")
    console = Console(quiet=quiet)
    console.hush_libraries()
    reader = load_model(model, revision, device, dtype)
    standard = reader.engine.backbone.default_budget()
    limits = share_tokens("always", reader.config, standard, coarse=coarse, region=region)
    with console.waiting("asking ..."):
        found = run(
            reader,
            asked,
            goal,
            EvalOptions("auto", *limits, max_new_tokens=max_new_tokens),
            region_thresholds=_numbers(region_thresholds),
            keep=keep,
            date=date,
            confidence_gates=confidence_gates,
        )
    save_pretrained(dataclasses.replace(reader.engine, config=found.applied(reader.config)), output)
    _tell(console, found, output, json=json)


def _tell(console: Console, found: Calibration, output: Path, *, json: bool) -> None:
    if json:
        console.record(_record(found) | {"output": str(output)})
        return
    from qzoom.evaluation.tables import calibration_lines

    for line in calibration_lines(found):
        console.result(line)
    console.note(f"saved   {output}")


def _numbers(text: str | None) -> tuple[float, ...]:
    """Comma-separated thresholds.

    Raises:
        typer.BadParameter: not numbers from 0 to 1.
    """
    try:
        found = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (-1.0,)
    if not all(0 <= number <= 1 for number in found):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 0 to 1, such as 0.4,0.6.")
    return found


def _record(found: Calibration) -> dict[str, object]:
    return {
        "gate_threshold": found.gate_threshold,
        "region_threshold": found.region_threshold,
        "asked": found.asked,
        "failed": found.failed,
        "always_accuracy": found.always,
        **found.provenance,
    }
