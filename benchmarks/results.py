"""Make docs/results.md: the results of the benchmark programs in order, and the charts of the stored answers.

    python -m benchmarks.results --runs runs/evidence --data RECEIPTS      # the same as `make results`

Reads ladder.md, baselines.md and ablations.md from the results folder, names missing ones with the command that makes
them, says which of them an earlier embedded model gave, and draws the report (`qzoom report`) of the answers of the
weights that ladder.json names, or of the package's. RUNS may also hold answers of `qzoom eval`; without any, the
existing report stays. No question is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qzoom.errors import DataError, QZoomError
from qzoom.store.log import write_atomic

PARTS = {
    "ladder": "the ladder of caps (equal accuracy, equal budget, peaks)",
    "baselines": "every other way to look",
    "ablations": "the ablations",
    "r2i": "Region-to-Image distillation (base, R2I, zoom, both)",
}
OTHERS = {
    "accuracy.md": "the same limits with and without zooming, all fields",
    "pdf.md": "PDFs: which page is read, time and memory",
    "engine.md": "the engine beside transformers' own generate",
    "scale.md": "time at a published model's sizes, random weights",
    "start.md": "the start of the command",
    "serving.md": "the server under load",
}
INTRO = (
    "# Results\n\n"
    "Does zooming pay? All figures are of the embedded model, which is small and knows only receipts, drawn documents "
    "and drawn scenes: they show what the method does, not what a large model can do. The authors' figures stand "
    "beside them where there are any. This page is made by `make results`; nothing in it is written by hand.\n"
)


SECONDS = (
    "Their runs were made one after another, not side by side, so their seconds are no comparison; tokens and "
    "operations are, and the ladder's throughputs, which were timed in turn.\n"
)


def packaged_weights() -> str:
    """The digest of the embedded model."""
    from qzoom import QZoom
    from qzoom.checkpoints.weights import weights_digest

    return weights_digest(QZoom.from_pretrained("tiny").engine)


def reported_weights(results: Path) -> str:
    """The digest that the ladder's table names; without one, that of the package."""
    try:
        return str(json.loads((results / "ladder.json").read_text(encoding="utf-8"))["about"]["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return packaged_weights()


def answer_files(runs: Path, weights: str) -> list[Path]:
    """Answer files for the report: those of these weights under RUNS, or RUNS itself where it has no folder of any
    weights; none if there are none.

    Of drawn pictures those that the ladder reports, of receipts the plain ones and those of the other methods.
    """
    if not any((folder / "ladder").is_dir() for folder in runs.glob("*")):
        return [runs] if runs.is_file() or any(runs.rglob("*.jsonl")) else []
    chosen = runs / weights[:8]
    patterns = ("ladder/report/*.jsonl", "ladder/receipts/receipts-plain-*.jsonl", "baselines/receipts-*.jsonl")
    found = [path for pattern in patterns for path in sorted(chosen.glob(pattern))]
    return [path for path in found if path.read_bytes().count(b"\n") > 1]  # a file of one line has no answers yet


def charts(runs: Path, results: Path, data: Path | None, page: Path) -> list[str]:
    """Draw the report beside the results, or keep the one that is there; returns what the page says about it."""
    from qzoom.evaluation.report import write_report

    weights = reported_weights(results)
    files, folder = answer_files(runs, weights), results / "report"
    if files:
        write_report(files, folder, data=data)
        which = f"under `{runs.name}`" if files == [runs] else f"of the weights `{weights}`"
        said = f"Drawn of the answers {which}.\n"
    elif (folder / "report.md").is_file():
        said = "Drawn of the answers of an earlier run; the tables above may be of a later one.\n"
    else:
        return [f"No answers of the weights `{weights}` under `{runs.name}` yet, so there are no charts."]
    place = Path(os.path.relpath(folder, page.parent)).as_posix()
    report = (folder / "report.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in folder.glob("*.png") if f"({path.name})" in report)
    shown = [f"![Accuracy against seconds, visual tokens and FLOPs]({place}/{name})\n" for name in pictures]
    return [
        *shown,
        said,
        SECONDS,
        f"All runs with intervals, fronts and a gallery of failures: [report]({place}/report.md).",
    ]


def earlier_weights(parts: Sequence[str]) -> str:
    """What to say if an embedded model other than today's gave some of the tables; empty if none did."""
    named = {digest for part in parts for digest in re.findall(r"`tiny` \(weights `(\w+)`", part)}
    if not named:
        return ""
    today = packaged_weights()
    if named == {today}:
        return ""
    return (
        f"The package has the weights `{today}`. Tables that name other weights are of an earlier embedded model and "
        "were not measured again.\n"
    )


def compose(results: Path, page: Path, drawn: Sequence[str]) -> str:
    """The page as Markdown."""
    place = Path(os.path.relpath(results, page.parent)).as_posix()
    parts, missing = [INTRO], []
    for name, what in PARTS.items():
        path = results / f"{name}.md"
        if path.is_file():
            parts.append(path.read_text(encoding="utf-8").rstrip() + "\n")
        else:
            missing.append(f"- {what}: `python -m benchmarks.{name}`")
    if missing:
        parts.append("## Not measured yet\n\n" + "\n".join(missing) + "\n")
    parts.insert(1, earlier_weights(parts))
    parts.append("## Charts\n\n" + "\n".join(drawn) + "\n")
    others = [f"- [{what}]({place}/{name})" for name, what in OTHERS.items() if (results / name).is_file()]
    if others:
        parts.append("## Other measurements\n\n" + "\n".join(others) + "\n")
    return "\n".join(filter(None, parts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the stored answers")
    parser.add_argument("--data", type=Path, help="folder of the scanned receipts, for the gallery of failures")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the tables")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="page to write")
    given = parser.parse_args(arguments)
    text = compose(given.results, given.page, charts(given.runs, given.results, given.data, given.page))
    try:
        given.page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(given.page, text)
    except OSError as error:
        raise DataError(f"{given.page} cannot be written ({error.strerror}); check space and rights.") from error
    print(f"{given.page} is written.")


if __name__ == "__main__":
    try:
        main()
    except QZoomError as error:
        sys.exit(str(error))
