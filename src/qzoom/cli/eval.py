"""`qzoom eval` and `qzoom report`: measure answers, and compare runs on one page."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli.console import Console
from qzoom.cli.flags import flatten, optional
from qzoom.cli.options import Fresh, LookOptions, ModelOptions, OutputOptions, RegionTokens, parse_tokens
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from qzoom.evaluation.runner import EvalOptions
    from qzoom.evaluation.score import Scores
    from qzoom.model import QZoom

_FILE_ENDING = re.compile(r"\.[A-Za-z]{2,8}")
"""What a folder's name is not expected to end in, in contrast to runs/auto-0.5."""


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which pictures and questions of the tasks."""

    data: Annotated[
        Path | None, optional("Folder of NAME.jsonl; benchmarks: folder of files to read instead of the hub.")
    ] = None
    split: Annotated[
        str | None, optional("NAME of the file (default dev); benchmarks: name of the split.", metavar="NAME")
    ] = None
    data_revision: Annotated[str | None, optional("Benchmarks: revision of the data on the hub.")] = None
    seed: Annotated[
        int | None, typer.Option(min=0, show_default="0", help="documents, scenes: seed of the first image.")
    ] = None
    count: Annotated[
        int | None, typer.Option(min=1, show_default="100", help="documents, scenes: number of images.")
    ] = None
    limit: Annotated[int | None, optional("Use only the first N images.", min=1)] = None

    def for_files(self) -> dict[str, Any]:
        """Options that only tasks of files take, by their flags."""
        return {"--data": self.data, "--split": self.split, "--data-revision": self.data_revision}

    def for_synthetic(self) -> dict[str, Any]:
        """Options that only synthetic tasks take, by their flags."""
        return {"--seed": self.seed, "--count": self.count}

    def refuse_with_rescore(self, output: Path | None, *, fresh: bool) -> None:
        """Stored answers are scored as they are (typer.BadParameter: an option that chooses or stores others)."""
        given = self.for_files() | self.for_synthetic() | {"--limit": self.limit, "--output": output}
        given["--fresh"] = fresh or None
        for flag, value in given.items():
            if value is not None:
                raise typer.BadParameter(f"--rescore reads stored answers and asks nothing; leave {flag} out.")

    def open(self, name: str) -> Any:
        """One task (typer.BadParameter: an unknown task, or options that it cannot use; DataError: data that cannot be
        used)."""
        from qzoom.data.benchmarks.registry import open_task

        try:
            return open_task(
                name,
                data=self.data,
                split=self.split,
                revision=self.data_revision,
                seed=self.seed or 0,
                count=self.count or 100,
            )
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error


@dataclass(frozen=True, slots=True)
class AskingOptions:
    """How every question of a run is asked."""

    method: Annotated[
        str, typer.Option(help="How the region is chosen: qzoom follows --zoom, the others are baselines.")
    ] = "qzoom"
    max_visual_tokens: Annotated[
        int | None,
        optional(
            "Maximum number of visual tokens per question: all for the coarse view with --zoom never, else "
            "half for the coarse view and half for the regions; if one of the two limits is given, the other "
            "gets the rest.",
            min=1,
        ),
    ] = None
    region_tokens: RegionTokens = None
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat all questions with seeds 0 to N-1, if answers are sampled.")
    ] = 1
    temperature: Annotated[float, typer.Option(min=0, max=100, help="Sampling temperature; 0 decodes greedily.")] = 0.0
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of questions answered as a batch; with 1, the questions about an image share its coarse pass.",
        ),
    ] = 1
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, show_default="the benchmark's, else 128", help="Maximum number of tokens of an answer."),
    ] = None
    output: Annotated[
        Path | None,
        optional(
            "Store every answer in this folder, or for one task in this file.jsonl; a rerun resumes.", "--output", "-o"
        ),
    ] = None
    fresh: Fresh = False


@flatten
def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK...",
            show_default=False,
            help="receipts, documents, scenes, textvqa, infovqa, chartqa, ocrbench, docvqa, vstar, mme_realworld_lite, "
            "hrbench4k, hrbench8k, zoombench. Apart: qzoom eval zoomgap, qzoom eval coverage.",
        ),
    ] = None,
    *,
    data: DataOptions,
    model: ModelOptions,
    look: LookOptions,
    asking: AskingOptions,
    out: OutputOptions,
    rescore: Annotated[
        list[Path] | None, optional("Score stored answers again, without a model: a file or folder.")
    ] = None,
) -> None:
    """Evaluate answers, regions, tokens and time on images with known answers.

    Exact match ignores case, spaces, currency and final punctuation. All questions about an image share a coarse pass
    and its time. A question that fails counts as wrong.

    Example: qzoom eval receipts --data receipts --split dev --max-visual-tokens 288 --json
    """
    console = out.console
    if rescore:
        data.refuse_with_rescore(asking.output, fresh=asking.fresh)
        _rescore(rescore, tasks, console, json=out.json)
        return
    names = list(dict.fromkeys(tasks or []))
    _check_usage(names, data, asking)
    run = _Evaluation(look, asking, console, several=len(names) > 1, json=out.json)
    run.check()
    opened = [data.open(name) for name in names]
    console.hush_libraries()
    for task in opened:
        for seed in range(asking.seeds):
            run.file(task.name, seed)
    reader = look.configured(model.load())
    if asking.method == "qzoom" and look.zoom == "auto" and not reader.has_region:
        console.note("note    The model has no region branch, so it is measured with --zoom never.")
        run = dataclasses.replace(run, look=dataclasses.replace(look, zoom="never"))
    for task in opened:
        run.measure(reader, task, data.limit)


def _check_usage(names: list[str], data: DataOptions, asking: AskingOptions) -> None:
    """Options that belong to none of the tasks are mistakes."""
    from qzoom.data.benchmarks.registry import BENCHMARKS, TASK_NAMES
    from qzoom.data.questions import DRAWN

    if not names:
        raise typer.BadParameter("name at least one TASK, for example: receipts")
    synthetic = {name in DRAWN for name in names}
    useless = ({} if False in synthetic else data.for_files()) | ({} if True in synthetic else data.for_synthetic())
    if not BENCHMARKS.keys() & set(names):
        useless["--data-revision"] = data.data_revision
    for flag, value in useless.items():
        if value is not None and set(names) <= set(TASK_NAMES):
            raise typer.BadParameter(f"{flag} has no meaning for the task {', '.join(names)}; leave it out.")
    if asking.fresh and asking.output is None:
        raise typer.BadParameter("--fresh needs --output.")


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One call of `qzoom eval` over one or several tasks."""

    look: LookOptions
    asking: AskingOptions
    console: Console
    several: bool
    json: bool

    def check(self) -> None:
        """A known method, readable limits, and seeds only where answers are sampled (typer.BadParameter: otherwise)."""
        self.look.coarse()
        parse_tokens(self.asking.region_tokens, "--region-tokens")
        try:
            options = self._plain(0)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error
        if self.asking.seeds > 1 and not options.is_random:
            raise typer.BadParameter("--seeds changes nothing when nothing is drawn: give a --temperature above 0.")

    def measure(self, reader: QZoom, task: Any, limit: int | None) -> None:
        """Ask every question of one task, once per seed, and print the figures."""
        from qzoom.evaluation.runner import run
        from qzoom.evaluation.score import score

        results: list[Scores] = []
        seeds = self.asking.seeds
        for seed in range(seeds):
            options = self._options(reader, task, seed)
            with self.console.progress(f"{task.name}, pictures") as (update,):
                rows = run(
                    reader,
                    task,
                    options,
                    limit=limit,
                    output=self.file(task.name, seed),
                    fresh=self.asking.fresh,
                    on_picture=update,
                    batch_size=self.asking.batch_size,
                )
            scores = score(rows, task.fields)
            if scores.errors:
                first = next(row.error for row in rows if row.error)
                self.console.note(
                    f"{scores.errors} of {scores.n} questions failed and count as wrong; the first: {first}"
                )
                if self.asking.output is not None:
                    passing = sum(row.passing for row in rows)
                    self.console.note(f"The same command asks {passing} of them again, and all with --fresh.")
            about = task.identity | {"model": reader.name} | _asking_record(options)
            title = f"{task.name}, seed {seed}" if seeds > 1 else task.name if self.several else ""
            _figures(self.console, scores, about, json=self.json, title=title)
            results.append(scores)
        if seeds > 1:
            _over_seeds(self.console, task.name, results, json=self.json)

    def file(self, task: str, seed: int) -> Path | None:
        """Where one run's answers go: the file that was named, or one of its own in the folder."""
        output, seeds = self.asking.output, self.asking.seeds
        if output is None:
            return None
        if output.suffix == ".jsonl" and not output.is_dir():
            if self.several or seeds > 1:
                raise typer.BadParameter(f"{output} is one file, but several runs are asked for; name a folder.")
            return output
        if output.is_file() or (not output.is_dir() and _FILE_ENDING.fullmatch(output.suffix)):
            raise typer.BadParameter(f"{output} is no folder and does not end in .jsonl; name one of the two.")
        return output / (f"{task}-seed{seed}.jsonl" if seeds > 1 else f"{task}.jsonl")

    def _plain(self, seed: int) -> EvalOptions:
        from qzoom.evaluation.runner import EvalOptions

        return EvalOptions(self.look.zoom, method=self.asking.method, temperature=self.asking.temperature, seed=seed)

    def _options(self, reader: QZoom, task: Any, seed: int) -> EvalOptions:
        """How the model is asked, its own limits and thresholds filled in."""
        from qzoom.engine.request import share_tokens

        plain = self._plain(seed)
        thresholds = self.look.thresholds(reader)
        coarse, region = share_tokens(
            plain.zoom_mode,
            reader.config,
            reader.engine.backbone.default_budget(),
            coarse=self.look.coarse(),
            region=parse_tokens(self.asking.region_tokens, "--region-tokens"),
            total=self.asking.max_visual_tokens,
        )
        return dataclasses.replace(
            plain,
            coarse_tokens=coarse,
            region_tokens=region,
            max_new_tokens=self.asking.max_new_tokens or task.max_new_tokens,
            gate_threshold=thresholds["gate_threshold"],
            region_threshold=thresholds["region_threshold"],
        )


def _rescore(paths: list[Path], tasks: list[str] | None, console: Console, *, json: bool) -> None:
    """Figures of stored answers."""
    from qzoom.data.benchmarks.registry import fields_of
    from qzoom.data.samples import answer_files, read_answers
    from qzoom.evaluation.score import score

    if tasks:
        raise typer.BadParameter("--rescore reads stored answers and asks nothing; leave the tasks out.")
    for file in answer_files(paths):
        header, rows = read_answers(file)
        questions = header["settings"].get("questions", {})
        scores = score(rows, fields_of(questions.get("task", "")))
        _figures(console, scores, questions | {"file": str(file)}, json=json, title=str(file))


def _asking_record(options: EvalOptions) -> dict[str, Any]:
    """The settings beside the figures; a limit is [minimum, maximum] or null for the model's own."""
    budgets = {"coarse_tokens": options.coarse_tokens, "region_tokens": options.region_tokens}
    limits = {name: [b.min_tokens, b.max_tokens] if b else None for name, b in budgets.items()}
    sampled = {"temperature": options.temperature, "draw": options.seed} if options.is_random else {}
    return {"zoom": options.zoom_mode, "method": options.method, **limits, **sampled}


def _figures(console: Console, scores: Scores, about: dict[str, Any], *, json: bool, title: str = "") -> None:
    """One run's figures; `title` names the run where there are several."""
    if json:
        console.record(about | scores.to_dict())
        return
    if title:
        console.result(f"{title}:")
    from qzoom.evaluation.tables import score_lines

    for line in score_lines(scores):
        console.result(line)


def _over_seeds(console: Console, name: str, runs: Sequence[Scores], *, json: bool) -> None:
    """Mean and standard deviation of the task's metric over runs that differ in the seed."""
    record: dict[str, Any] = {"task": name, "seeds": len(runs), "metric": runs[0].metric}
    for variant in ("strict", "harness"):
        values = [getattr(run, variant)["all"] for run in runs]
        record |= {f"{variant}_mean": statistics.fmean(values), f"{variant}_sd": statistics.stdev(values)}
    if json:
        console.record(record)
    else:
        console.result(
            f"{name}, {len(runs)} seeds: {record['metric']} {record['strict_mean']:.1%}, standard deviation "
            f"{record['strict_sd']:.1%}"
        )


@flatten
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Answer files of `qzoom eval`, or folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, charts, Markdown and figures.")],
    *,
    out: OutputOptions,
    data: Annotated[Path | None, optional("Folder of the receipts, to show their images.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "What zooming buys",
    failures: Annotated[
        int, typer.Option(min=0, max=50, help="Maximum number of failures of a kind that are shown.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap intervals.")] = 0,
    page: Annotated[Path | None, optional("Also write the Markdown to this file.")] = None,
) -> None:
    """Compare evaluations: accuracy against seconds, visual tokens and FLOPs, paired differences, failures.

    Runs with the same questions are compared with each other. report.html is self-contained.

    Example: qzoom report runs/final -o out/report
    """
    from qzoom.evaluation.report import findings, write_report

    console = out.console
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; name a folder.", param_hint="--output")
    tasks = write_report(runs, output, title=title, data=data, failures_each=failures, seed=seed, page=page)
    if out.json:
        console.record({"tasks": [task.to_dict() for task in tasks]})
    else:
        for task in tasks:
            console.result(f"{task.name}: {len(task.runs)} runs, {task.questions} questions")
            for sentence in findings(task):
                console.result(f"  {sentence}")
    console.note(f"saved   {output / 'report.html'}")
