"""`qzoom calibrate`: choose thresholds for one goal from the user's own questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qzoom.cli.flags import build_settings, flatten, optional
from qzoom.cli.options import CoarseTokens, ModelOptions, OutputOptions, RegionTokens, parse_tokens

if TYPE_CHECKING:
    from qzoom.evaluation.calibrate import Calibration

MaxAccuracyLoss = Annotated[
    float | None, optional("Goal: lose at most this share of accuracy against always zooming.", min=0, max=1)
]
Confidence = Annotated[
    float, typer.Option(min=0, max=1, help="Confidence of the bound on the loss and of the intervals.")
]
RegionThresholds = Annotated[
    str | None,
    optional(
        "Region thresholds to compare as well, separated by commas; the questions need answers.", metavar="A,B,..."
    ),
]
ConfidenceGates = Annotated[
    bool, typer.Option("--confidence-gates", help="Also make the methods margin and entropy zoom as often as the gate.")
]


@flatten
def calibrate(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="JSONL file with one question per line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the adapter with the chosen thresholds.")],
    *,
    model: ModelOptions,
    out: OutputOptions,
    share_zoomed: Annotated[float | None, optional("Goal: the share of questions that zoom.", min=0, max=1)] = None,
    latency_ms: Annotated[float | None, optional("Goal: at most this mean latency per question.", min=0)] = None,
    max_accuracy_loss: MaxAccuracyLoss = None,
    confidence: Confidence = 0.95,
    region_thresholds: RegionThresholds = None,
    confidence_gates: ConfidenceGates = False,
    keep: Annotated[Path | None, optional("Folder for the answers; another goal then needs no new answers.")] = None,
    date: Annotated[str | None, optional("Date that is recorded in the adapter's provenance.")] = None,
    coarse_tokens: CoarseTokens = None,
    region_tokens: RegionTokens = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 128,
) -> None:
    """Choose the thresholds of gate and region map for one goal, and write an adapter with them to --output.

    Every question is answered twice: from the coarse pass, and zoomed. With answers in the file, accuracy is measured
    against them; without, the zoomed answer is the reference. A loss is bounded exactly, with the stated confidence, as
    if the questions were drawn independently; too few questions are refused.

    Example: qzoom calibrate questions.jsonl --share-zoomed 0.3 -o calibrated
    """
    from qzoom.checkpoints.adapter import save_pretrained
    from qzoom.checkpoints.writing import check_target
    from qzoom.data.questions import read_calibration_questions
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.calibrate import CalibrationGoal
    from qzoom.evaluation.calibrate import calibrate as run
    from qzoom.evaluation.runner import EvalOptions

    wishes = {"share_zoomed": share_zoomed, "latency_ms": latency_ms, "max_accuracy_loss": max_accuracy_loss}
    goal = build_settings(CalibrationGoal, wishes | {"confidence": confidence})
    coarse = parse_tokens(coarse_tokens, "--coarse-tokens")
    region = parse_tokens(region_tokens, "--region-tokens")
    task = read_calibration_questions(questions)
    check_target(output, "adapter")
    console = out.console
    console.hush_libraries()
    reader = model.load()
    standard = reader.engine.backbone.default_budget()
    limits = share_tokens("always", reader.config, standard, coarse=coarse, region=region)
    with console.waiting("asking ..."):
        calibration = run(
            reader,
            task,
            goal,
            EvalOptions("auto", *limits, max_new_tokens=max_new_tokens),
            region_thresholds=_numbers(region_thresholds),
            keep=keep,
            date=date,
            confidence_gates=confidence_gates,
        )
    save_pretrained(dataclasses.replace(reader.engine, config=calibration.applied(reader.config)), output)
    _tell(calibration, output, out)


def _tell(calibration: Calibration, output: Path, out: OutputOptions) -> None:
    from qzoom.evaluation.tables import calibration_lines

    console = out.console
    console.warn_few(f"calibrated on {calibration.asked} questions", calibration.asked, "Give more.")
    if not out.json:
        for line in calibration_lines(calibration):
            console.result(line)
        console.note(f"saved   {output}")
        return
    names = ("gate_threshold", "region_threshold", "asked", "failed")
    figures = {name: getattr(calibration, name) for name in names} | {"always_accuracy": calibration.always}
    console.record(figures | calibration.provenance | {"output": str(output)})


def _numbers(text: str | None) -> tuple[float, ...]:
    """Comma-separated thresholds."""
    try:
        numbers = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        numbers = (-1.0,)
    if not all(0 <= number <= 1 for number in numbers):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 0 to 1, such as 0.4,0.6.")
    return numbers
