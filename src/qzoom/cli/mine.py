"""`qzoom mine`: where zooming loses and gains, for `qzoom train answers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qzoom.cli import options
from qzoom.cli.console import Console
from qzoom.cli.label import Fresh, Images, Output, PerPicture, Processes, Questions, Seed, SkipBad

if TYPE_CHECKING:
    from qzoom.labels.hard_cases import MineReport
    from qzoom.llm.settings import CallSettings
    from qzoom.scoring.judge import Judge

__all__ = ["mine"]

CoarseTokens = Annotated[int, typer.Option(min=4, help="Most visual tokens of the coarse look.")]
RegionTokens = Annotated[int, typer.Option(min=1, help="Most visual tokens of the regions.")]
Longest = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Aligned = Annotated[bool, typer.Option(help="Give regions aligned positions, as stage 2 trains them.")]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible API for what exact rules leave open.", show_default=False)
]
JudgeModel = Annotated[str, typer.Option(help="The judge's name there.", show_default=False)]
JudgeBudget = Annotated[int, typer.Option(min=0, help="Most requests of all runs with this output; 0 for no limit.")]
JudgeParallel = Annotated[int, typer.Option(min=1, help="Requests at once.")]
JudgeTimeout = Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")]
JudgeRetries = Annotated[int, typer.Option(min=0, help="Further tries after failures that may pass.")]


def mine(
    questions: Questions,
    output: Output,
    model: options.Model = "tiny",
    coarse_tokens: CoarseTokens = 576,
    region_tokens: RegionTokens = 576,
    max_new_tokens: Longest = 128,
    aligned: Aligned = True,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = "",
    judge_budget: JudgeBudget = 100_000,
    judge_parallel: JudgeParallel = 4,
    judge_timeout: JudgeTimeout = 60.0,
    judge_retries: JudgeRetries = 5,
    per_picture: PerPicture = 4,
    images: Images = "",
    skip_bad: SkipBad = False,
    processes: Processes = 1,
    seed: Seed = 0,
    fresh: Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Answer from the coarse look and zoomed, and judge both against known answers (stage 2).

    Exact rules judge where they can. The rest goes to the judge, whose key is read from QZOOM_JUDGE_KEY; without one it
    stays open and is not trained on.

    Example: qzoom mine --model runs/regions/model --questions my.jsonl -o labels/mined
    """
    from qzoom.cli.label import make_choice, progress, read_question_sets
    from qzoom.labels.hard_cases import MineRun
    from qzoom.labels.hard_cases import mine as run

    if judge_url is not None and not judge_model:
        raise typer.BadParameter("name the judge's model with --judge-model.")
    console = Console(quiet=quiet)
    judge = None
    if judge_url is not None:
        from qzoom.llm.settings import CallSettings

        calls = CallSettings(retries=judge_retries, budget_requests=judge_budget)
        judge = _judge(output, judge_url, judge_model, judge_timeout, calls)
    found = read_question_sets(questions, skip_bad, per_picture, seed, console)
    console.hush_libraries()
    choice = make_choice(model, revision, device, dtype)
    how = MineRun(coarse_tokens, region_tokens, max_new_tokens, aligned, images)
    asked = found.questions
    with progress(console, "mining", len(asked)) as advance:
        report = run(
            *(choice, asked, output, how),
            judge=judge,
            parallel=judge_parallel,
            seed=seed,
            processes=processes,
            fresh=fresh,
            on_question=advance,
        )
    _say(report, len(found.skipped), output, console, json)


def _judge(output: Path, url: str, model: str, timeout_s: float, calls: CallSettings) -> Judge:
    """The judge, whose replies are cached beside the records."""
    from qzoom.llm.settings import EndpointSettings
    from qzoom.scoring.judge import CACHE, open_judge

    return open_judge(EndpointSettings(url, model, "QZOOM_JUDGE_KEY", timeout_s), calls, output / CACHE)


def _say(report: MineReport, skipped_lines: int, output: Path, console: Console, json: bool) -> None:
    from dataclasses import asdict

    if json:
        console.record(asdict(report) | {"skipped_lines": skipped_lines})
        return
    console.result(
        f"{report.turns} questions: {report.hard} hard, {report.improvements} improved, {report.kept} right both ways, "
        f"{report.both_wrong} wrong both ways, {report.open} open; records in {output}"
    )
    if report.judge_failures:
        console.note(f"{report.judge_failures} requests to the judge failed; the first: {report.reasons[0]}")
    elif report.skipped:
        console.note(f"{report.skipped} questions left out; the first: {report.reasons[0]}")
