"""Lift and pointing over the depth of the model, as a picture."""

from __future__ import annotations

from pathlib import Path

from qzoom.evaluation.coverage import Coverage
from qzoom.plots.style import ACCENTS, CARD, COARSE, HAIRLINE, INK, MUTED, Colour

__all__ = ["plot_coverage"]


def plot_coverage(found: Coverage, path: Path, *, title: str = "") -> Path:
    """Draw the curves; the file's ending chooses the format.

    Args:
        found: the figures.
        path: the file; its folder is made.
        title: above the drawing.

    Returns:
        The path written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained", facecolor=_rgb(CARD))
    FigureCanvasAgg(figure)
    lifts, hits = figure.subplots(1, 2)
    for name, colour in (("relative", ACCENTS[0]), ("raw", COARSE)):
        curves = found.measures[name]
        lifts.plot(found.depths, curves["lift"], "o-", ms=3, color=_rgb(colour), label=f"{name}, mean of heads")
        lifts.plot(found.depths, curves["best_lift"], ":", color=_rgb(colour), label=f"{name}, best head")
        hits.plot(found.depths, curves["hit"], "o-", ms=3, color=_rgb(colour), label=name)
        chosen = curves["layer"]
        lifts.plot([chosen["depth"]], [chosen["lift"]], "o", ms=10, mfc="none", mec=_rgb(colour))
        hits.plot([chosen["depth"]], [chosen["hit"]], "o", ms=10, mfc="none", mec=_rgb(colour))
    lifts.axhline(1, color=_rgb(MUTED), lw=1, ls="--")
    hits.axhline(found.chance_hit, color=_rgb(MUTED), lw=1, ls="--", label="chance")
    lifts.set_ylabel("lift: share of attention / share of area", color=_rgb(INK))
    hits.set_ylabel("highest cell on the place", color=_rgb(INK))
    hits.set_ylim(0, None)
    for axes in (lifts, hits):
        axes.set_xlabel("depth: share of the layers", color=_rgb(INK))
        axes.grid(color=_rgb(HAIRLINE), linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_rgb(MUTED))
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title or f"{found.n} questions about {found.pictures} pictures; rings: chosen layer, other half")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None} if path.suffix.lower() == ".png" else None)
    return path


def _rgb(colour: Colour) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255
