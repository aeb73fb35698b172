"""The notebook view of an answer: one self-contained piece of HTML, nothing loaded from elsewhere.

All texts are escaped, and the figure is embedded as a JPEG, so the cell stays small and survives being shared.
"""

from __future__ import annotations

import base64
import html
import io

from qzoom.plots.answer import plot_answer
from qzoom.plots.text import clean
from qzoom.types import Answer

__all__ = ["answer_html"]

_WIDTH_PX = 900  # half the figure's width: sharp on dense displays


def answer_html(answer: Answer) -> str:
    """HTML for a notebook cell.

    Args:
        answer: with its pictures, which are drawn, the first region's one; without pictures only texts are shown.

    Returns:
        A single `<div>`.
    """
    question, text = html.escape(clean(answer.question)), html.escape(clean(answer.text) or "(no text)")
    summary = f"<b>{text}</b><br><small>{html.escape(_summary(answer))}</small>"
    if not answer.images:
        return f'<div style="max-width:{_WIDTH_PX}px"><p>{question}</p><p>{summary}</p></div>'
    image = answer.regions[0].image if answer.regions else 0
    buffer = io.BytesIO()
    plot_answer(answer, image=image if image < len(answer.images) else 0).save(buffer, "JPEG", quality=88)
    payload = base64.b64encode(buffer.getvalue()).decode("ascii")
    words = html.escape(f"{clean(answer.question)} {clean(answer.text)}", quote=True)
    return (
        f'<div style="max-width:{_WIDTH_PX}px">'
        f'<img style="width:100%;height:auto;border-radius:8px" alt="{words}" src="data:image/jpeg;base64,{payload}">'
        f"<details><summary>{text}</summary><small>{html.escape(_summary(answer))}</small></details></div>"
    )


def _summary(answer: Answer) -> str:
    """Gate, boxes and tokens in one line of plain text."""
    gate, usage = answer.gate, answer.usage
    parts = ["gate not asked" if gate.score is None else f"gate {gate.score:.3f}, zooms from {gate.threshold}"]
    parts += [f"region {list(region.box)} of picture {region.image + 1}" for region in answer.regions] or ["no zoom"]
    parts.append(f"{usage.coarse_tokens} coarse + {usage.region_tokens} region tokens")
    return "; ".join([*parts, *([gate.note] if gate.note else []), *answer.notes])
