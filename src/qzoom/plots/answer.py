"""`plot_answer`: one figure of one answer, to look at and to share; `answer_html`: the same in a notebook cell.

Question on top; the page with heat map and boxes; its regions enlarged beside it (below it for wide pictures); the
answer, the gate, tokens and time. The figure is composed of panels and grows with its content. The HTML loads nothing
from elsewhere: all texts are escaped and the figure is embedded as a JPEG, so the cell survives being shared.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import Image, ImageDraw

from qzoom.errors import DataError
from qzoom.plots.overlay import draw_boxes, heat_overlay, rounded
from qzoom.plots.panels import answer_panel, beside, crop_panel, gate_panel, label, stack, time_panel, tokens_panel
from qzoom.plots.text import (
    ACCENTS,
    COARSE,
    FIGURE_WIDTH_PX,
    GAP_PX,
    HAIRLINE,
    MARGIN_PX,
    MUTED,
    PAPER,
    RADIUS_PX,
    clean,
    paragraph,
)
from qzoom.types import Answer, Box, Region

_INNER_PX = FIGURE_WIDTH_PX - 2 * MARGIN_PX
_TALL_PAGE_PX = 1240  # most height of a page that stands beside the panels
_WIDE_PAGE_PX = 940  # most height of a page that lies above them
_MAX_CROPS = 4


def plot_answer(
    answer: Answer, image: int = 0, coarse_text: str | None = None, token_px: int | None = None
) -> PIL.Image.Image:
    """Draw an answer.

    Args:
        answer: with its pictures (`answer.images`).
        coarse_text: the answer of the coarse pass alone, shown beside the zoomed one.
        token_px: original pixels per side of a visual token, for the cost at native resolution; None derives it from a
            region that was read, and leaves that cost out when there is none.

    Raises:
        DataError: the answer has no such picture.
    """
    _check_picture(answer, image)
    source = answer.images[image].convert("RGB")
    regions = [region for region in answer.regions if region.image == image]
    subject = _Subject(answer, image, source, regions, coarse_text, token_px)
    body = _beside_page(subject) if source.width <= 1.15 * source.height else _below_page(subject)
    parts = [body, _footer(answer, image)]
    if answer.question.strip():
        question = paragraph(answer.question, _INNER_PX, 38, weight="bold", max_lines=3)
        parts.insert(0, stack([label("Question", _INNER_PX), question], 12))
    content = stack(parts, 40)
    out = Image.new("RGB", (FIGURE_WIDTH_PX, content.height + 2 * MARGIN_PX - 16), PAPER)
    out.paste(content, (MARGIN_PX, MARGIN_PX), content)
    return out


def save_plot(answer: Answer, path: Path, image: int | None = None, coarse_text: str | None = None) -> Path:
    """Draw an answer and write it; the file ending chooses the format.

    Args:
        image: index of the picture to draw; None takes the one whose region was read first.
        coarse_text: the answer of the coarse pass alone, shown beside the zoomed one.

    Raises:
        DataError: an ending that no picture format has, or a folder that cannot be written.
    """
    if image is None:
        image = answer.regions[0].image if answer.regions else 0
    check_plot_path(path)
    figure = plot_answer(answer, image=image, coarse_text=coarse_text)
    options: dict[str, Any] = {"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.save(path, **options)
    except OSError as error:
        reason = (error.strerror or "the file cannot be written").lower()
        raise DataError(f"Cannot save the figure to {str(path)!r}: {reason}; choose another place.") from error
    return path


def check_plot_path(path: Path) -> None:
    """Find out before an answer is computed whether its figure can be written (DataError: an ending that no picture
    format has, a folder, or a place that cannot be written)."""
    endings = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".pdf"}
    if "\0" in str(path):
        raise DataError(f"Cannot save the figure as {str(path)!r}: a path has no NUL character; choose another place.")
    where = next((place for place in (path, *path.parents) if os.path.lexists(place)), Path())
    if path.is_dir():
        problem = "it is a folder; name a file in it"
    elif path.suffix.lower() not in endings:
        problem = f"use one of these endings: {', '.join(sorted(endings))}"
    elif where != path and not where.is_dir():
        problem = f"{str(where)!r} is not a directory; choose another place"
    elif not os.access(where, os.W_OK):
        problem = f"{str(where)!r} cannot be written; choose another place"
    else:
        return
    raise DataError(f"Cannot save the figure as {str(path)!r}: {problem}.")


def _check_picture(answer: Answer, image: int) -> None:
    count = len(answer.images)
    if count == 0:
        raise DataError(
            "Cannot draw this answer: it carries no pictures; draw the answer that `ask` returned, not a copy of it "
            "read from JSON."
        )
    if not 0 <= image < count:
        raise DataError(f"Cannot draw picture {image}: the pictures of this answer are 0 to {count - 1}; name one.")


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is drawn: one picture of an answer, its regions, and what `plot_answer` was given beside them."""

    answer: Answer
    image: int
    source: PIL.Image.Image
    regions: list[Region]
    coarse_text: str | None
    token_px: int | None


def _page(subject: _Subject, width_px: int, height_px: int) -> tuple[PIL.Image.Image, list[Box]]:
    """The page within width x height, tinted and outlined, and its boxes in it."""
    source, regions = subject.source, subject.regions
    scale = min(width_px / source.width, height_px / source.height)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    page = source.resize(size, Image.Resampling.LANCZOS)
    for heat in subject.answer.heat_maps:
        if heat.image == subject.image:
            page = heat_overlay(page, heat.values)
    page, boxes = draw_boxes(page, [r.box for r in regions], source.size, numbered=len(regions) > 1)
    return rounded(page, RADIUS_PX, HAIRLINE), boxes


def _beside_page(subject: _Subject) -> PIL.Image.Image:
    """Page on the left, panels on the right."""
    answer, source, regions = subject.answer, subject.source, subject.regions
    page, boxes = _page(subject, 820, _TALL_PAGE_PX)
    column = max(page.width, 300)
    width = _INNER_PX - column - GAP_PX
    texts = _texts(answer, subject.coarse_text, width)
    costs = stack(_costs(answer, subject.token_px, width), 30)
    crops, places = _crops(source, regions, width, max(260, page.height - texts.height - costs.height - 3 * GAP_PX))
    middle = stack(crops, 24) if crops else None
    least = texts.height + costs.height + 44 + (middle.height + 44 if middle else 0)
    height = max(page.height, least)
    out = Image.new("RGBA", (_INNER_PX, height), (*PAPER, 0))
    left, right = (column - page.width) // 2, column + GAP_PX
    out.paste(page, (left, 0), page)
    if middle is not None:
        # Towards the height of what it enlarges, by no more than half of the room that is left.
        first = texts.height + 44
        wish = (boxes[0][1] + boxes[0][3] - middle.height) // 2 - first if len(regions) == 1 else 0
        top = first + min(max(wish, 0), (height - least) // 2)
        if len(regions) == 1:
            (_, y0, x1, y1), place = boxes[0], places[0]
            edge = left + x1 + 3
            _wedge(out, [(edge, y0), (right, top + place[1]), (right, top + place[3]), (edge, y1)])
        out.paste(middle, (right, top), middle)
    out.paste(texts, (right, 0), texts)
    out.paste(costs, (right, (height if middle else least) - costs.height), costs)
    return out


def _below_page(subject: _Subject) -> PIL.Image.Image:
    """Page above, panels below in two columns."""
    answer, source, regions = subject.answer, subject.source, subject.regions
    page, boxes = _page(subject, _INNER_PX, _WIDE_PAGE_PX)
    width = (_INNER_PX - GAP_PX) // 2
    texts, costs = _texts(answer, subject.coarse_text, width), stack(_costs(answer, subject.token_px, width), 30)
    crops, places = _crops(source, regions, width, 520)
    panels = beside([stack(crops, 24), stack([texts, costs], 40)] if crops else [texts, costs], GAP_PX)
    out = Image.new("RGBA", (_INNER_PX, page.height + 44 + panels.height), (*PAPER, 0))
    left = (_INNER_PX - page.width) // 2
    out.paste(page, (left, 0), page)
    top = page.height + 44
    if len(regions) == 1 and places:
        box, (x0, y0, x1, _) = boxes[0], places[0]
        _wedge(out, [(left + box[0], box[3] + 3), (x0, top + y0), (x1, top + y0), (left + box[2], box[3] + 3)])
    out.paste(panels, (0, top), panels)
    return out


def _texts(answer: Answer, coarse_text: str | None, width_px: int) -> PIL.Image.Image:
    """The answer, with the coarse one beside it if given."""
    colour = ACCENTS[0] if answer.regions else COARSE
    title = "Answer, zoomed" if answer.regions else "Answer from the coarse view"
    if coarse_text is None:
        return answer_panel(title, answer.text, width_px, colour)
    half = (width_px - 36) // 2
    return beside(
        [answer_panel(title, answer.text, half, colour), answer_panel("Coarse pass alone", coarse_text, half, COARSE)],
        36,
    )


def _costs(answer: Answer, token_px: int | None, width_px: int) -> list[PIL.Image.Image]:
    blocks = [gate_panel(answer.gate, width_px), tokens_panel(answer.usage, _native_tokens(answer, token_px), width_px)]
    if answer.timing_ms:
        blocks.append(time_panel(answer.timing_ms, width_px))
    return blocks


def _crops(
    source: PIL.Image.Image, regions: list[Region], width_px: int, height_px: int
) -> tuple[list[PIL.Image.Image], list[Box]]:
    """The regions enlarged within a total height, and where each crop lies in its panel."""
    shown = regions[:_MAX_CROPS]
    room = (height_px - 24 * max(0, len(shown) - 1)) // max(1, len(shown))
    panels, places = [], []
    for i, region in enumerate(shown):
        width, height = region.box[2] - region.box[0], region.box[3] - region.box[1]
        words = f"{width} × {height} px"
        if region.tokens:
            words += f" read in {region.tokens:,} tokens"
        name = f"Region {i + 1}" if len(regions) > 1 else "Region"
        if i == _MAX_CROPS - 1 and len(regions) > _MAX_CROPS:
            words += f", {len(regions) - _MAX_CROPS} more on the page"
        colour = ACCENTS[i % len(ACCENTS)]
        panel, place = crop_panel(source.crop(region.box), f"{name}: {words}", width_px, max(150, room), colour)
        panels.append(panel)
        places.append(place)
    return panels, places


def _native_tokens(answer: Answer, token_px: int | None) -> int | None:
    """Visual tokens of all pictures at native resolution, uncapped; None when the size of a token is not known."""
    sizes = answer.image_sizes_px or tuple(picture.size for picture in answer.images)
    token_px = token_px or answer.cell_px or None
    if token_px is None:
        read = next((r for r in answer.regions if r.tokens and r.crop_size_px), None)
        if read is None or read.crop_size_px is None:
            return None
        token_px = max(1, round(math.sqrt(read.crop_size_px[0] * read.crop_size_px[1] / read.tokens)))
    return sum(max(1, round(w / token_px)) * max(1, round(h / token_px)) for w, h in sizes)


def _wedge(image: PIL.Image.Image, corners: list[tuple[int, int]]) -> None:
    """A faint beam from a box to its enlargement: two corners on the page, two at the crop, in order around."""
    layer = Image.new("RGBA", image.size, (*ACCENTS[0], 0))
    draw = ImageDraw.Draw(layer)
    draw.polygon(corners, fill=(*ACCENTS[0], 26))
    draw.line([corners[0], corners[1]], fill=(*ACCENTS[0], 130), width=3)
    draw.line([corners[3], corners[2]], fill=(*ACCENTS[0], 130), width=3)
    image.alpha_composite(layer)


def _footer(answer: Answer, image: int) -> PIL.Image.Image:
    width, height = answer.images[image].size
    words = [f"{width:,} × {height:,} px"]
    page = next((region.page for region in answer.regions if region.image == image and region.page), None)
    if len(answer.images) > 1:
        words.insert(0, f"picture {image + 1} of {len(answer.images)}")
    if page:
        words.insert(0, f"page {page} of the PDF")
        elsewhere = sorted({r.image + 1 for r in answer.regions if r.image != image})
        if elsewhere:
            words.append(f"also looked closely at picture {', '.join(map(str, elsewhere))}")
    words += answer.notes
    if answer.finish_reason != "stop":
        words.append({"length": "answer cut at its token limit"}.get(answer.finish_reason, answer.finish_reason))
    return paragraph("   ·   ".join(["qzoom", *words]), _INNER_PX, 20, MUTED, max_lines=2)


_WIDTH_PX = 900  # half the figure's width: sharp on dense displays


def answer_html(answer: Answer) -> str:
    """HTML for a notebook cell. Returns a single `<div>`."""
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
    parts = ["gate not asked" if gate.score is None else "gate {}, zooms from {}".format(*gate.figures())]
    parts += [f"region {list(region.box)} of picture {region.image + 1}" for region in answer.regions] or ["no zoom"]
    parts.append(f"{usage.coarse_tokens} coarse + {usage.region_tokens} region tokens")
    return "; ".join([*parts, *([gate.note] if gate.note else []), *answer.notes])
