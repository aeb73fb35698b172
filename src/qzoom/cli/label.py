"""`qzoom label regions`, `gate` and `hard-cases`: training labels from the model's own answers, resumable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli.flags import Flags, flatten, optional
from qzoom.cli.options import Fresh, ModelOptions, OutputOptions
from qzoom.errors import ConfigError
from qzoom.labels.settings import GateRecipe, HardCaseRecipe, RegionRecipe

if TYPE_CHECKING:
    from qzoom.labels.workers import LabelRun
    from qzoom.scoring.judge import Judge
    from qzoom.store.schema import Question


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """What is labelled, and into which store."""

    questions: Annotated[
        list[str],
        typer.Option(
            "--questions",
            help="JSONL file; or documents:FIRST:COUNT, scenes:FIRST:COUNT, receipts:FOLDER:SPLIT. May be repeated.",
        ),
    ]
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the records; a rerun resumes.")]
    per_picture: Annotated[int, typer.Option(min=1, help="Maximum number of questions about a synthetic image.")] = 4
    images: Annotated[str, optional("Folder of the images, if they have moved.")] = ""
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out and count lines that cannot be used.")] = False
    processes: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="Seed that selects the questions about synthetic images.")] = 0
    fresh: Fresh = False


Job = tuple["LabelRun", "list[Question]", Callable[[Any, str], None]]


@contextmanager
def _job(
    title: str, labels: LabelOptions, model: ModelOptions, out: OutputOptions, *, rows: bool = False
) -> Iterator[Job]:
    """Read the questions and show progress while they are labelled; the last of the three prints the figures."""
    from qzoom.data.questions import open_questions
    from qzoom.labels.workers import LabelRun

    console = out.console
    if labels.output.exists() and not labels.output.is_dir():
        raise typer.BadParameter(f"{labels.output} is a file; name a folder.", param_hint="--output")
    questions, skipped = open_questions(
        labels.questions,
        skip_bad=labels.skip_bad,
        per_picture=labels.per_picture,
        seed=labels.seed,
        rows=rows,
    )
    for _, reason in skipped[:5]:
        console.note(f"left out: {reason}")
    if len(skipped) > 5:
        console.note(f"left out: {len(skipped)} lines in all")
    console.hush_libraries()
    with console.progress(title) as (update,):
        run = LabelRun(
            model.spec(),
            labels.output,
            labels.images,
            labels.seed,
            labels.processes,
            labels.fresh,
            _counting(update, len(questions)),
        )
        yield run, questions, functools.partial(_report, labels, len(skipped), out)


def _report(labels: LabelOptions, skipped_lines: int, out: OutputOptions, report: Any, text: str) -> None:
    """One JSON line, or the text and the first reasons for questions left out and left for a later run."""
    console = out.console
    if out.json:
        console.record(asdict(report) | {"skipped_lines": skipped_lines})
        return
    console.result(f"{text}; records in {labels.output}")
    failures = getattr(report, "judge_failures", 0)
    if failures:
        console.note(f"{failures} requests to the judge failed; the first: {report.reasons[0]}")
    elif report.skipped:
        console.note(f"{report.skipped} questions left out; the first: {report.reasons[0]}")
    if report.unread:
        console.note(
            f"{report.unread} questions not labelled, since their image cannot be read; the first: "
            f"{report.unread_reason} Run the same command again to label them."
        )


def _counting(update: Callable[..., None], total: int) -> Callable[[int], None]:
    """An update by the number done since the last call."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        update(done, total)

    return advance


@flatten
def regions(
    *,
    labels: LabelOptions,
    model: ModelOptions,
    recipe: Annotated[
        RegionRecipe,
        Flags(
            "QZOOM_LABEL_REGIONS_",
            ("source", "heads", "tokens", "max_new_tokens", "maps.foreground"),
            {"source": "--from"},
        ),
    ],
    out: OutputOptions,
    rows: Annotated[
        bool,
        typer.Option("--rows", help="With --from boxes: documents' and receipts' boxes cover what is on their rows."),
    ] = False,
) -> None:
    """Make region labels from the attention of the model's own answers (stage 1), for `qzoom train regions`.

    With --from boxes the labels come from the known answer boxes instead. A recipe has further settings: view,
    box_prompt, sink_by, sink_heads, maps, search.

    Example: qzoom label regions --model tiny --questions my.jsonl -o labels/regions
    """
    from qzoom.labels.label_regions import label_regions

    if rows and recipe.source != "boxes":
        raise typer.BadParameter("it widens known boxes; add --from boxes.", param_hint="--rows")
    with _job("labels", labels, model, out, rows=rows) as (run, questions, tell):
        report = label_regions(run, questions, recipe)
    agreement = "" if report.agreement is None else f", {report.agreement:.1%} of them on a known answer"
    tell(report, f"{report.usable} of {report.maps} label maps usable{agreement}")
    if report.too_weak:
        out.console.note(
            f"{report.too_weak} label maps not usable: the highest attention is below maps.min_peak "
            f"({recipe.maps.min_peak:g}). Choose other --heads, or set a lower min_peak in a recipe."
        )
    if report.too_large:
        share = 0.5 if recipe.source == "boxes" else recipe.maps.ignore_share
        advice = (
            "The boxes mark too much of these images."
            if recipe.source == "boxes"
            else "The attention is spread out: choose other --heads or a trained model, set a higher ignore_share in a "
            "recipe, or take known boxes with --from boxes."
        )
        out.console.note(
            f"{report.too_large} label maps not usable: the box around the foreground covers {share:.0%} of the map or "
            f"more. {advice}"
        )
    if report.unread or not report.usable:
        raise typer.Exit(1)


@flatten
def gate(
    *,
    labels: LabelOptions,
    model: ModelOptions,
    recipe: Annotated[GateRecipe, Flags("QZOOM_LABEL_GATE_")],
    out: OutputOptions,
) -> None:
    """Make gate labels from answers at increasing resolutions, or coarse and zoomed (stage 3), for `qzoom train gate`.

    Questions need known answers. With --by zoom the model needs a region branch.

    Example: qzoom label gate --model tiny --questions my.jsonl -o labels/gate
    """
    from qzoom.labels.gate import label_gate

    with _job("gate labels", labels, model, out) as (run, questions, tell):
        report = label_gate(run, questions, recipe)
    tell(
        report,
        f"{report.questions} questions: {report.closer} need zooming, for {report.enough} the coarse pass is "
        f"enough, {report.dropped} dropped",
    )
    if not report.closer + report.enough:
        out.console.note(
            "No gate label is usable: the answers are never right, or without a pattern. Choose other --tokens, "
            "a better model, or questions that it can answer."
        )
    if report.unread or not report.closer + report.enough:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """The language model that judges what exact rules leave undecided."""

    judge_url: Annotated[
        str | None, optional("OpenAI-compatible API of the judge, for answers that exact rules leave undecided.")
    ] = None
    judge_model: Annotated[str, optional("Name of the judge's model at that API.")] = ""
    judge_budget: Annotated[
        int, typer.Option(min=0, help="Maximum number of requests of all runs with this output folder; 0 for no limit.")
    ] = 100_000
    judge_parallel: Annotated[int, typer.Option(min=1, max=4096, help="Number of concurrent requests.")] = 4
    judge_timeout: Annotated[float, typer.Option(min=0.1, help="Time limit of a request in seconds.")] = 60.0
    judge_retries: Annotated[int, typer.Option(min=0, help="Number of retries after transient failures.")] = 5

    def open(self, folder: Path) -> Judge | None:
        """The judge, whose replies are cached beside the records; None without a URL (typer.BadParameter: a URL without
        a model, a model without one, or what is none; ConfigError: a key that no header can carry)."""
        if self.judge_url is None:
            if self.judge_model:
                raise typer.BadParameter("it needs --judge-url, where the model is.", param_hint="--judge-model")
            return None
        if not self.judge_model:
            raise typer.BadParameter("name the judge's model with --judge-model.")
        from qzoom.llm.settings import CallSettings, EndpointSettings
        from qzoom.scoring.judge import CACHE, open_judge

        calls = CallSettings(retries=self.judge_retries, budget_requests=self.judge_budget)
        try:
            endpoint = EndpointSettings(
                self.judge_url, self.judge_model, "QZOOM_JUDGE_KEY", self.judge_timeout, concurrency=self.judge_parallel
            )
        except ConfigError as error:
            raise typer.BadParameter(str(error), param_hint="--judge-url") from error
        return open_judge(endpoint, calls, folder / CACHE)


@flatten
def hard_cases(
    *,
    labels: LabelOptions,
    model: ModelOptions,
    recipe: Annotated[HardCaseRecipe, Flags("QZOOM_LABEL_HARD_CASES_")],
    judge: JudgeOptions,
    out: OutputOptions,
) -> None:
    """Find hard cases: answer from the coarse pass and zoomed, and judge both against known answers (stage 2).

    Exact rules decide first. Other answers go to the judge, whose key is read from QZOOM_JUDGE_KEY; without a judge
    they stay undecided and are not trained on.

    Example: qzoom label hard-cases --model runs/regions/model --questions my.jsonl -o labels/hard-cases
    """
    from qzoom.labels.hard_cases import label_hard_cases

    opened = judge.open(labels.output)
    with _job("hard cases", labels, model, out) as (run, questions, tell):
        report = label_hard_cases(run, questions, recipe, judge=opened, parallel=judge.judge_parallel)
    tell(
        report,
        f"{report.turns} questions: {report.hard} hard, {report.improvements} improved, {report.both_right} right both "
        f"ways, {report.both_wrong} wrong both ways, {report.undecided} undecided",
    )
    if report.undecided == report.turns:
        out.console.note("No question is decided: name a judge with --judge-url, or give questions with short answers.")
    if report.unread or report.undecided == report.turns:
        raise typer.Exit(1)
