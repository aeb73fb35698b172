"""Make docs/results.md: the results of the benchmark programs in order, and the charts of the stored answers.

    python -m benchmarks.results --runs runs/evidence --data RECEIPTS      # the same as `make results`

Reads ladder.md, baselines.md and ablations.md from the results folder, names missing ones with the command that makes
them, says which of them an earlier embedded model gave, and draws the report (`qzoom report`) of the newest weights'
answers. RUNS may also hold answers of `qzoom eval`; without any, the existing report stays. No question is asked.
"""

from __future__ import annotations

import argparse
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


def answer_files(runs: Path) -> list[Path]:
    """Answer files for the report: those of the newest weights under RUNS, else RUNS itself; none if there are none.

    Of drawn pictures those that the ladder reports, of receipts the plain ones and those of the other methods.
    """
    weights = [folder for folder in runs.glob("*") if (folder / "ladder").is_dir()]
    if not weights:
        return [runs] if runs.is_file() or any(runs.rglob("*.jsonl")) else []
    newest = max(weights, key=lambda folder: max(path.stat().st_mtime for path in (folder / "ladder").rglob("*")))
    patterns = ("ladder/report/*.jsonl", "ladder/receipts/receipts-plain-*.jsonl", "baselines/receipts-*.jsonl")
    found = [path for pattern in patterns for path in sorted(newest.glob(pattern))]
    return [path for path in found if path.read_bytes().count(b"\n") > 1]  # a file of one line has no answers yet


def charts(runs: Path, results: Path, data: Path | None, page: Path) -> list[str]:
    """Draw the report beside the results, or keep the one that is there; returns what the page says about it."""
    from qzoom.evaluation.report import write_report

    files, folder, said = answer_files(runs), results / "report", []
    if files:
        write_report(files, folder, data=data)
    elif (folder / "report.md").is_file():
        said.append("Drawn of the answers of an earlier run; the tables above may be of a later one.\n")
    else:
        return [f"No answers under `{runs.name}` yet, so there are no charts."]
    place = Path(os.path.relpath(folder, page.parent)).as_posix()
    report = (folder / "report.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in folder.glob("*.png") if f"({path.name})" in report)
    said += [f"![Accuracy against seconds, visual tokens and FLOPs]({place}/{name})\n" for name in pictures]
    return [*said, f"All runs with intervals, fronts and a gallery of failures: [report]({place}/report.md)."]


def earlier_weights(parts: Sequence[str]) -> str:
    """What to say if an embedded model other than today's gave some of the tables; empty if none did."""
    from qzoom import QZoom
    from qzoom.checkpoints.weights import weights_digest

    named = {digest for part in parts for digest in re.findall(r"`tiny` \(weights `(\w+)`", part)}
    if not named:
        return ""
    today = weights_digest(QZoom.from_pretrained("tiny").engine)
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
