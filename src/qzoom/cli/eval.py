"""`qzoom eval`: how good the answers are on pictures with known answers, as one JSON line or a few lines to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.config import TokenBudget
    from qzoom.evaluation.runner import EvalOptions
    from qzoom.evaluation.score import Scores
    from qzoom.model import QZoom
    from qzoom.types import ZoomMode

__all__ = ["evaluate"]


Tasks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TASK...",
        show_default=False,
        help="receipts, documents, scenes, textvqa, infovqa, chartqa, ocrbench, docvqa, vstar, mme_realworld_lite, "
        "hrbench4k, hrbench8k, zoombench. Apart: qzoom eval zoomgap, qzoom eval coverage.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(show_default=False, help="receipts: the folder of NAME.jsonl; benchmarks: files instead of the hub."),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default=False, help="receipts: which file (dev); benchmarks: which split."),
]
DataRevision = Annotated[
    str | None, typer.Option(show_default=False, help="benchmarks: revision of the data on the hub.")
]
Seed = Annotated[int | None, typer.Option(min=0, show_default="0", help="documents, scenes: number of first picture.")]
Count = Annotated[int | None, typer.Option(min=1, show_default="100", help="documents, scenes: how many pictures.")]
Limit = Annotated[int | None, typer.Option(min=1, show_default=False, help="The first so many pictures only.")]
Method = Annotated[str, typer.Option(help="How to look: qzoom does as --zoom says, the others are baselines.")]
Seeds = Annotated[
    int, typer.Option(min=1, help="Ask all so many times, with seeds from 0 on, where answers are drawn.")
]
Temperature = Annotated[float, typer.Option(min=0, max=100, help="0 is greedy; above, answers are drawn.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together; 1 shares a picture's look instead.")]
MaxVisualTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Most visual tokens of a question: all for the coarse look with --zoom never, else half for the "
        "coarse look and half for the regions; where one of the two is given, the other gets the rest.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        show_default=False,
        help="Keep every answer in this folder, or for one task in this file.jsonl; a rerun continues it.",
    ),
]
Rescore = Annotated[
    list[Path] | None,
    typer.Option(show_default=False, help="Score kept answers again, no model needed: files, or folders of them."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start --output anew.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, show_default="the benchmark's, else 128", help="Most tokens of an answer.")
]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one call asks for, options read and checked."""

    zoom: ZoomMode
    method: str
    limits: tuple[TokenBudget | int | None, TokenBudget | int | None, int | None]  # coarse, region, both together
    thresholds: tuple[str | None, float | None, float | None]
    max_new_tokens: int | None
    temperature: float
    seeds: int
    batch_size: int
    limit: int | None
    output: Path | None
    fresh: bool
    json: bool


def evaluate(
    tasks: Tasks = None,
    data: Data = None,
    split: Split = None,
    data_revision: DataRevision = None,
    seed: Seed = None,
    count: Count = None,
    limit: Limit = None,
    model: options.Model = "tiny",
    method: Method = "qzoom",
    zoom: options.Zoom = "auto",
    max_visual_tokens: MaxVisualTokens = None,
    coarse_tokens: options.CoarseTokens = None,
    region_tokens: options.RegionTokens = None,
    seeds: Seeds = 1,
    temperature: Temperature = 0.0,
    batch_size: BatchSize = 1,
    output: Output = None,
    fresh: Fresh = False,
    rescore: Rescore = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    max_new_tokens: MaxNewTokens = None,
    gate_threshold: options.GateThreshold = None,
    region_threshold: options.RegionThreshold = None,
    preset: options.Preset = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure answers, regions, tokens and time on pictures with known answers.

    Exact match forgives case, spaces and currency. A picture is looked at once for all its questions, which share the
    time of that look. A question that fails counts as wrong.

    Example: qzoom eval receipts --data receipts --split dev --max-visual-tokens 288 --json
    """
    console = Console(quiet=quiet)
    if rescore:
        _rescore(rescore, tasks, console, json)
        return
    limits = (
        options.parse_tokens(coarse_tokens, "--coarse-tokens"),
        options.parse_tokens(region_tokens, "--region-tokens"),
        max_visual_tokens,
    )
    wanted = (preset, gate_threshold, region_threshold)
    asked = _Asked(
        zoom, method, limits, wanted, max_new_tokens, temperature, seeds, batch_size, limit, output, fresh, json
    )
    where = {"data": data, "split": split, "revision": data_revision}
    opened = _open(list(dict.fromkeys(tasks or [])), where, {"seed": seed, "count": count}, asked)
    console.hush_libraries()
    _measure_all(opened, (model, revision, device, dtype), asked, console)


def _open(names: list[str], where: dict[str, Any], drawn: dict[str, int | None], asked: _Asked) -> list[Any]:
    """All tasks; everything is checked before the model is loaded.

    Raises:
        typer.BadParameter: a wrong call.
    """
    from qzoom.data.benchmarks.registry import open_task
    from qzoom.errors import ConfigError

    if not names:
        raise typer.BadParameter("name at least one TASK, for example: receipts")
    flags = {"revision": "--data-revision"}
    for_files = {flags.get(name, f"--{name}"): value for name, value in where.items()}
    for_seeds = {f"--{name}": value for name, value in drawn.items()}
    _check_usage(names, for_files, for_seeds, asked.output, asked.fresh)
    _check_method(asked)
    seed, count = drawn["seed"] or 0, drawn["count"] or 100
    try:
        return [open_task(name, seed=seed, count=count, **where) for name in names]
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _check_usage(
    names: list[str], for_files: dict[str, Any], for_seeds: dict[str, Any], output: Path | None, fresh: bool
) -> None:
    """Options that belong to none of the tasks are mistakes.

    Raises:
        typer.BadParameter: one was given.
    """
    from qzoom.data.benchmarks.registry import TASK_NAMES
    from qzoom.data.drawn import SYNTHETIC_TASKS

    drawn = {name in SYNTHETIC_TASKS for name in names}
    useless = ({} if False in drawn else for_files) | ({} if True in drawn else for_seeds)
    for flag, value in useless.items():
        if value is not None and set(names) <= set(TASK_NAMES):
            raise typer.BadParameter(f"{flag} has no meaning for the task {', '.join(names)}; leave it out.")
    if fresh and output is None:
        raise typer.BadParameter("--fresh needs --output.")


def _check_method(asked: _Asked) -> None:
    """A known method, and seeds only where something is drawn.

    Raises:
        typer.BadParameter: otherwise.
    """
    from qzoom.errors import ConfigError
    from qzoom.evaluation.runner import EvalOptions

    try:
        asking = EvalOptions(asked.zoom, method=asked.method, temperature=asked.temperature)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if asked.seeds > 1 and not asking.is_random:
        raise typer.BadParameter("--seeds changes nothing when nothing is drawn: give a --temperature above 0.")


def _measure_all(tasks: list[Any], model: tuple[str, str | None, str, str], asked: _Asked, console: Console) -> None:
    """Load the model (name, revision, device, dtype) once and put every task to it."""
    from qzoom.cli.loading import load_model

    for task in tasks:
        for seed in range(asked.seeds):
            _file(asked, task.name, seed, len(tasks) > 1)
    reader = load_model(*model)
    for task in tasks:
        _measure(reader, task, asked, console, len(tasks) > 1)


def _measure(reader: QZoom, task: Any, asked: _Asked, console: Console, several: bool) -> None:
    """Ask every question of one task, once per seed, and print the figures."""
    from qzoom.cli.eval_output import asked_how, figures, over_seeds, progress
    from qzoom.evaluation.runner import run
    from qzoom.evaluation.score import score

    found: list[Scores] = []
    for number in range(asked.seeds):
        asking = _asking(reader, task, asked, number)
        output = _file(asked, task.name, number, several)
        with progress(console, task.name) as on_picture:
            rows = run(
                reader,
                task,
                asking,
                limit=asked.limit,
                output=output,
                fresh=asked.fresh,
                on_picture=on_picture,
                batch_size=asked.batch_size,
            )
        scores = score(rows, task.fields)
        if scores.errors:
            first = next(row.error for row in rows if row.error)
            console.note(f"{scores.errors} of {scores.n} questions failed and count as wrong; the first: {first}")
        about = task.identity | {"model": reader.name} | asked_how(asking)
        title = f"{task.name}, seed {number}" if asked.seeds > 1 else task.name if several else ""
        figures(console, scores, about, json=asked.json, title=title)
        found.append(scores)
    if asked.seeds > 1:
        over_seeds(console, task.name, found, json=asked.json)


def _asking(reader: QZoom, task: Any, asked: _Asked, seed: int) -> EvalOptions:
    """How the model is asked, its own limits and thresholds filled in."""
    import dataclasses

    from qzoom.cli.loading import thresholds
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.runner import EvalOptions

    coarse, region, total = asked.limits
    plain = EvalOptions(asked.zoom, method=asked.method, temperature=asked.temperature, seed=seed)
    standard = reader.engine.backbone.default_budget()
    limits = share_tokens(plain.zoom_mode, reader.config, standard, coarse=coarse, region=region, total=total)
    gate, cell = thresholds(reader, *asked.thresholds)
    own_length: int = getattr(task, "max_new_tokens", 128)
    return dataclasses.replace(
        plain,
        coarse_tokens=limits[0],
        region_tokens=limits[1],
        gate_threshold=gate,
        region_threshold=cell,
        max_new_tokens=asked.max_new_tokens or own_length,
    )


def _file(asked: _Asked, task: str, seed: int, several: bool) -> Path | None:
    """Where one run's answers go: the file that was named, or one of its own in the folder."""
    if asked.output is None:
        return None
    if asked.output.suffix == ".jsonl" and not asked.output.is_dir():
        if several or asked.seeds > 1:
            raise typer.BadParameter(f"{asked.output} is one file, but several runs are asked for; name a folder.")
        return asked.output
    return asked.output / (f"{task}-seed{seed}.jsonl" if asked.seeds > 1 else f"{task}.jsonl")


def _rescore(paths: list[Path], tasks: list[str] | None, console: Console, json: bool) -> None:
    """Figures of kept answers.

    Raises:
        typer.BadParameter: tasks were named too.
        DataError: a file that holds something else.
    """
    from qzoom.cli.eval_output import figures
    from qzoom.data.benchmarks.registry import fields_of
    from qzoom.data.samples import answer_files, read_answers
    from qzoom.evaluation.score import score

    if tasks:
        raise typer.BadParameter("--rescore reads kept answers and asks nothing; leave the tasks out.")
    for file in answer_files(paths):
        header, rows = read_answers(file)
        questions = header["settings"].get("questions", {})
        scores = score(rows, fields_of(questions.get("task", "")))
        figures(console, scores, questions | {"file": str(file)}, json=json, title=str(file))
