"""`qzoom mine`: where zooming loses and gains, for `qzoom train answers`."""

from __future__ import annotations

from typing import Annotated

import typer

from qzoom.cli import options
from qzoom.cli.console import Console
from qzoom.cli.label import Fresh, Images, Output, PerPicture, Processes, Questions, Seed, SkipBad

__all__ = ["mine"]


def mine(
    questions: Questions,
    output: Output,
    model: options.Model = "tiny",
    coarse_tokens: Annotated[int, typer.Option(min=4, help="Most visual tokens of the coarse look.")] = 576,
    region_tokens: Annotated[int, typer.Option(min=1, help="Most visual tokens of the regions.")] = 576,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    aligned: Annotated[bool, typer.Option(help="Give regions aligned positions, as stage 2 trains them.")] = True,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible API for what exact rules leave open.", show_default=False)
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name there.", show_default=False)] = "",
    judge_budget: Annotated[int, typer.Option(min=0, help="Most requests of this run.")] = 100_000,
    judge_parallel: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    judge_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 60.0,
    judge_retries: Annotated[int, typer.Option(min=0, help="Further tries after failures that may pass.")] = 5,
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
    from dataclasses import asdict

    from qzoom.cli.label import make_choice, progress, read_question_sets
    from qzoom.labels.judge import Judge, JudgeSettings
    from qzoom.labels.mine import MineRun
    from qzoom.labels.mine import mine as run

    if judge_url is not None and not judge_model:
        raise typer.BadParameter("name the judge's model with --judge-model.")
    console = Console(quiet=quiet)
    judge = None
    if judge_url is not None:
        output.mkdir(parents=True, exist_ok=True)
        settings = JudgeSettings(
            judge_url, judge_model, timeout_s=judge_timeout, retries=judge_retries, budget=judge_budget
        )
        judge = Judge(settings, output / "judge.jsonl")
    found = read_question_sets(questions, skip_bad, per_picture, seed, console)
    console.hush_libraries()
    with progress(console, "mining", len(found.questions)) as advance:
        report = run(
            make_choice(model, revision, device, dtype),
            found.questions,
            output,
            MineRun(coarse_tokens, region_tokens, max_new_tokens, aligned, images),
            judge=judge,
            parallel=judge_parallel,
            seed=seed,
            processes=processes,
            fresh=fresh,
            on_question=advance,
        )
    if json:
        console.record(asdict(report) | {"skipped_lines": len(found.skipped)})
        return
    console.result(
        f"{report.turns} questions: {report.hard} hard, {report.improvements} improved, {report.kept} right both ways, "
        f"{report.both_wrong} wrong both ways, {report.open} open; records in {output}"
    )
    if report.judge_failures:
        console.note(f"{report.judge_failures} requests to the judge failed; the first: {report.reasons[0]}")
    elif report.skipped:
        console.note(f"{report.skipped} questions left out; the first: {report.reasons[0]}")
