"""The chart of the README: accuracy against visual tokens, plain and zooming, with 95 % intervals over pictures.

python -m benchmarks.chart docs/results/ladder.json docs/images/accuracy-tokens.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INK, PLAIN, ZOOM = "#181c24", "#8a92a0", "#de5426"


def draw(ladder: dict[str, Any], path: Path) -> None:
    """Draw mean visual tokens per question (log scale) against exact match in per cent.

    Args:
        ladder: what `benchmarks.ladder` writes: for each kind the points of the plain model and of zooming.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    kinds = ladder["kinds"]
    figure = Figure(figsize=(11, 3.6), dpi=160, layout="constrained")
    for axes, (kind, data) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        for points, colour, label in ((data["plain"], PLAIN, "plain"), (data["zoom"], ZOOM, "qzoom")):
            tokens = [point["tokens"] for point in points]
            accuracy = [100 * point["accuracy"] for point in points]
            low, high = ([100 * point["interval"][i] for point in points] for i in (0, 1))
            axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(tokens, accuracy, "o-", color=colour, label=label, markersize=4, linewidth=1.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([64, 128, 256, 512, 1024], ["64", "128", "256", "512", "1024"])
        axes.set_title(f"{kind} ({data['questions']:,} questions)", fontsize=10, color=INK)
        axes.set_xlabel("visual tokens per question", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("exact match, %", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": ""})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
