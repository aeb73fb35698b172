"""Accuracy, tokens and time of one model with and without zooming, as tables.

    python -m benchmarks.accuracy --data RECEIPTS_FOLDER

Asks the questions of the scanned receipts (with --data) and of held-out synthetic documents and scenes in four ways:
the coarse pass alone, with the gate, always zooming, and a single view with the same total number of tokens. Writes
`accuracy.md` and `accuracy.json` into --results; raw answers stay in --raw, so that the same command resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.choices import interval_by_picture, paired
from qzoom.evaluation.tables import interval, markdown_table, percent, write_figures

if TYPE_CHECKING:
    from qzoom.data.samples import AnswerRow, Task
    from qzoom.model import QZoom
    from qzoom.types import ZoomMode


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a table: how to look and how many visual tokens each look may take."""

    name: str
    zoom: ZoomMode
    coarse_tokens: int
    region_tokens: int | None


def settings(coarse: int, region: int) -> tuple[Setting, ...]:
    """The four ways to look: one spends the coarse budget only, the others may spend the total."""
    return (
        Setting(f"never, <= {coarse}", "never", coarse, None),
        Setting(f"auto, <= {coarse} + {region}", "auto", coarse, region),
        Setting(f"always, <= {coarse} + {region}", "always", coarse, region),
        Setting(f"never, <= {coarse + region}", "never", coarse + region, None),
    )


def measure(model: QZoom, task: Task, setting: Setting, given: argparse.Namespace) -> list[AnswerRow]:
    """Ask every question of a task in one setting."""
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.runner import EvalOptions, run

    limits = share_tokens(
        setting.zoom,
        model.config,
        model.engine.backbone.default_budget(),
        coarse=setting.coarse_tokens,
        region=setting.region_tokens,
    )
    words = [task.name, setting.zoom, str(setting.coarse_tokens + (setting.region_tokens or 0))]

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{task.name}, {setting.name}: {done}/{total} pictures", end="", file=sys.stderr, flush=True)

    rows = run(
        model,
        task,
        EvalOptions(setting.zoom, *limits, max_new_tokens=given.max_new_tokens),
        limit=given.limit if task.name == "receipts" else None,
        output=given.raw / f"{'-'.join(words)}.jsonl",
        fresh=given.fresh,
        on_picture=show,
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def results_of(task: Task, measured: dict[Setting, list[AnswerRow]]) -> dict[str, Any]:
    """Figures of every setting, and each zooming one against the plain look at the same total."""
    from qzoom.evaluation.score import score

    lines = []
    for setting, rows in measured.items():
        figures = score(rows, task.fields).to_dict()
        ends = [round(end, 4) for end in interval_by_picture(rows)]
        lines.append({"setting": asdict(setting), "interval_95": ends, **figures})
    plain = list(measured)[-1]
    pairs = []
    for setting, rows in measured.items():
        if setting.zoom != "never":
            pairs.append({"first": setting.name, "second": plain.name, **paired(rows, measured[plain])})
    pictures = len({row.picture for row in measured[plain]})
    return {"questions": task.identity, "pictures": pictures, "lines": lines, "pairs": pairs}


def table(name: str, result: dict[str, Any]) -> str:
    """One task's results as Markdown."""
    shown = [key for key in ("total", "date", "company", "code") if key in result["lines"][0]["exact_match"]]
    groups = [key for key in ("easy", "hard") if key in result["lines"][0].get("difficulty", {})]
    head = ["Zoom, visual tokens", *shown, *groups, "all", "95 %", "ANLS", "zoomed", "hit", "box area", "tokens", "s"]
    rows = [head]
    for line in result["lines"]:
        exact, (low, high) = line["exact_match"], line["interval_95"]
        rows.append(
            [
                line["setting"]["name"].replace("<=", "≤"),
                *(percent(exact[key]) for key in shown),
                *(percent(line["difficulty"][key]["exact_match"]) for key in groups),
                percent(exact["all"]),
                interval((low, high), sign=False),
                percent(line["anls"]),
                *(percent(line[key]) for key in ("zoomed", "hit_rate", "box_area")),
                f"{line['visual_tokens']:.0f}",
                f"{line['seconds']:.3f}",
            ]
        )
    lines = [markdown_table(rows).rstrip()]
    for pair in result["pairs"]:
        lines.append(
            f"\n{pair['first'].replace('<=', '≤')} against {pair['second'].replace('<=', '≤')}: "
            f"{percent(pair['difference'], sign=True)} points ({interval(pair['interval'])}), right alone "
            f"{pair['only_first']} against {pair['only_second']} of {pair['questions']} questions."
        )
    failed = sum(line["errors"] for line in result["lines"])
    remark = f" {failed} questions failed and count as wrong." if failed else ""
    count = f"{result['lines'][0]['n']} questions about {result['pictures']} pictures.{remark}"
    return f"## {name.capitalize()}\n\n{count}\n\n" + "\n".join(lines) + "\n"


def report(about: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """The whole page as Markdown."""
    intro = (
        "# What zooming buys\n\n"
        f"Model `{about['model']}` (weights `{about['weights']}`, {about['dtype']}, {about['device']}, "
        f"{about['threads']} threads, torch {about['torch']}, transformers {about['transformers']}). Made by "
        "`python -m benchmarks.accuracy`. Shares are per cent; exact match forgives case, spaces and currency. `95 %`: "
        "interval of `all`; it and those of the differences, which are of pairs, come from drawing pictures with "
        "replacement, since questions about one picture depend on each other. `hit`: of the zooms on questions with "
        "known places, those whose region holds one of the places. `box area`: mean share of the picture that the "
        "regions cover. `tokens`: mean visual tokens per question. `s`: mean seconds per question; a picture "
        "is looked at once for all its questions, which share the time of that look.\n\n"
    )
    return intro + "\n".join(table(name, result) for name, result in results.items())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the scanned receipts; without it they are skipped")
    parser.add_argument("--split", default="dev", help="split of the receipts")
    parser.add_argument("--limit", type=int, help="use only the first N receipts")
    parser.add_argument("--model", default="tiny", help="embedded model, folder or hub id")
    parser.add_argument("--pictures", type=int, default=60, help="number of synthetic images of each kind; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first held-out image")
    parser.add_argument("--coarse-tokens", type=int, default=144)
    parser.add_argument("--region-tokens", type=int, default=144)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="maximum number of tokens of an answer")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder for the tables")
    parser.add_argument("--raw", type=Path, default=Path("runs/accuracy"), help="folder for the raw answers")
    parser.add_argument("--fresh", action="store_true", help="discard stored answers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the tables, print them; returns what the JSON file holds."""
    given = parse(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from qzoom.cli.options import ModelOptions
    from qzoom.data.benchmarks.registry import open_task
    from qzoom.evaluation.runner import describe_model, describe_software

    tasks: list[Task] = []
    if given.data is not None:
        tasks.append(open_task("receipts", data=given.data, split=given.split))
    if given.pictures:
        tasks += [open_task(name, seed=given.seed, count=given.pictures) for name in ("documents", "scenes")]
    model = ModelOptions(given.model, None, given.device).load()
    about = describe_software(model) | describe_model(model) | {"threads": torch.get_num_threads()}
    ways = settings(given.coarse_tokens, given.region_tokens)
    ways = tuple(way for way in ways if model.has_region or way.zoom == "never")
    results = {task.name: results_of(task, {way: measure(model, task, way, given) for way in ways}) for task in tasks}
    found = {"about": about, "results": results}
    text = report(about, results)
    write_figures(given.results, "accuracy", found, text)
    print(text)
    return found


if __name__ == "__main__":
    main()
