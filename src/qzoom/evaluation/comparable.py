"""Whether two runs may be paired: the same questions, asked in the same way.

Models may differ, since their difference is what is measured. Everything else that decides an answer must be equal, or
the difference would be that of two settings. What a run did not store cannot be compared; it is named instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qzoom.data.questions import DRAWN
from qzoom.errors import DataError
from qzoom.evaluation.zoom_views import VIEWS, GapSettings, View

_DECIDES: dict[View, tuple[str, ...]] = {
    "full": ("max_visual_tokens", "max_new_tokens"),
    "region": ("crop_scale", "crop_margin", "crop_min_px", "places"),
    "boxed": ("box_style", "places"),
    "zoom": ("zoom_mode",),
}
"""Settings that decide the answers of a view; those of the full view decide all of them."""


def check_gaps(this: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Compare what stands beside the figures of two runs of `qzoom eval zoomgap`, see `ViewAnswers`.

    Returns:
        What could not be compared, in one sentence; "" if everything could.

    Raises:
        DataError: they asked other questions, or a view that both have in another way; it names the settings.
    """
    shipped = this.get("crop_scale") == other.get("crop_scale") == "shipped"  # such crops have no other settings
    names: dict[str, None] = {}
    for view in VIEWS:
        if view in this["views"] and view in other["views"]:
            decisive = _DECIDES[view][:1] if view == "region" and shipped else _DECIDES[view]
            names |= dict.fromkeys(decisive)
    settings = {*GapSettings().to_dict(), "model"}
    mine, theirs = ({k: v for k, v in run.items() if k not in settings} for run in (this, other))
    return _check(this, other, data=_identifying(mine, theirs), ways=list(names))


def check_coverage(this: Mapping[str, Any], other: Mapping[str, Any], data: Iterable[str]) -> str:
    """The same for two runs of `qzoom eval coverage`. `data`: names of this run's values that identify its questions
    (DataError: other questions, or another limit)."""
    mine, theirs = ({name: run[name] for name in data if name in run} for run in (this, other))
    return _check(this, other, data=_identifying(mine, theirs), ways=["max_visual_tokens"])


def _identifying(this: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which values tell questions apart. A file has a digest, whatever it is called; drawn pictures have their numbers
    in their names, wherever a run began."""
    if "sha256" in this and this["sha256"] == other.get("sha256"):
        return []
    names = list({**this, **other})
    drawn = this.get("task") in DRAWN and this.get("task") == other.get("task")
    return [name for name in names if name != "seed"] if drawn else names


def _check(this: Mapping[str, Any], other: Mapping[str, Any], *, data: Sequence[str], ways: Sequence[str]) -> str:
    """Refuse values that differ, and name those that a run did not store."""
    pairs = {name: (this.get(name), other.get(name)) for name in (*data, *ways)}
    different = [
        f"{name} is {mine!r:.40} here and {theirs!r:.40} there"
        for name, (mine, theirs) in pairs.items()
        if None not in (mine, theirs) and mine != theirs
    ]
    if different:
        raise DataError(
            f"The runs cannot be compared: {', '.join(different)}; ask one of them again with the other's data and "
            "settings."
        )
    unknown = [name for name in data if (this.get(name) is None) != (other.get(name) is None)]
    unknown += [name for name in ways if None in pairs[name]]
    return f"Not stored with both runs, so not compared: {', '.join(unknown)}." if unknown else ""
