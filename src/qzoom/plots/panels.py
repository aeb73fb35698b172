"""The pieces of an answer's figure, each a transparent picture of a given width: texts, gate, tokens, crops.

Every function takes the width it may use and returns an RGBA picture of exactly that width, as high as it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
from PIL import Image, ImageDraw

from qzoom.plots.overlay import rounded
from qzoom.plots.text import (
    ACCENTS,
    COARSE,
    HAIRLINE,
    INK,
    MUTED,
    RADIUS_PX,
    TRACK,
    Colour,
    draw_text,
    paragraph,
    text_width,
    wrap,
)
from qzoom.types import GateDecision, Usage

LABEL_PX = 22
BODY_PX = 26
BAR_PX = 26


def blank(width_px: int, height_px: int) -> PIL.Image.Image:
    """A transparent picture."""
    return Image.new("RGBA", (max(1, width_px), max(1, height_px)), (255, 255, 255, 0))


def stack(blocks: Sequence[PIL.Image.Image], gap_px: int) -> PIL.Image.Image:
    """Blocks below each other, left-aligned."""
    height = sum(b.height for b in blocks) + gap_px * (len(blocks) - 1)
    out = blank(max(b.width for b in blocks), height)
    y = 0
    for block in blocks:
        out.paste(block, (0, y))
        y += block.height + gap_px
    return out


def beside(blocks: Sequence[PIL.Image.Image], gap_px: int) -> PIL.Image.Image:
    """Blocks next to each other, top-aligned."""
    out = blank(sum(b.width for b in blocks) + gap_px * (len(blocks) - 1), max(b.height for b in blocks))
    x = 0
    for block in blocks:
        out.paste(block, (x, 0))
        x += block.width + gap_px
    return out


def label(text: str, width_px: int, colour: Colour = MUTED) -> PIL.Image.Image:
    """A small heading."""
    return paragraph(text, width_px, LABEL_PX, colour, weight="bold", max_lines=1)


def answer_panel(title: str, text: str, width_px: int, colour: Colour, max_lines: int = 4) -> PIL.Image.Image:
    """An answer under its title, with a bar in its colour on the left; long answers are set smaller."""
    inner = width_px - 30
    sizes = (50, 40, 32, 26)
    shown = text.strip() or "(no text)"
    size = next((s for s in sizes if len(wrap(shown, inner, s, "bold", max_lines + 1)) <= (1 if s > 40 else 2)), 26)
    body = paragraph(
        shown,
        inner,
        size,
        INK if text.strip() else MUTED,
        weight="bold",
        max_lines=max_lines if size > 26 else max_lines + 2,
    )
    content = stack([label(title, inner, colour), body], 14)
    out = blank(width_px, content.height)
    ImageDraw.Draw(out).rounded_rectangle((0, 0, 7, out.height - 1), 3, fill=(*colour, 255))
    out.paste(content, (30, 0))
    return out


def crop_panel(
    crop: PIL.Image.Image, caption: str, width_px: int, max_height_px: int, colour: Colour
) -> tuple[PIL.Image.Image, tuple[int, int, int, int]]:
    """A region enlarged, framed in its colour, with a caption. Returns the panel, and the crop's xyxy in it."""
    text = paragraph(caption, width_px, LABEL_PX, MUTED, max_lines=1)
    room = max(60, max_height_px - text.height - 14)
    scale = min(width_px / crop.width, room / crop.height, 12)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    shown = rounded(crop.convert("RGB").resize(size, Image.Resampling.LANCZOS), RADIUS_PX, colour, 5)
    out = blank(width_px, shown.height + 14 + text.height)
    out.paste(shown, (0, 0))
    out.paste(text, (0, shown.height + 14))
    return out, (0, 0, *size)


def gate_panel(gate: GateDecision, width_px: int) -> PIL.Image.Image:
    """The gate's score on a bar from 0 to 1, the threshold as a mark, and what it decided."""
    if gate.score is None:
        verdict = "Not asked: the region was read in any case" if gate.zoomed else "Not asked: coarse pass only"
        parts = [label("Gate", width_px), paragraph(verdict, width_px, BODY_PX, INK)]
        return stack([*parts, *_note(gate.note, width_px)], 12)
    score = min(max(gate.score, 0.0), 1.0)
    colour = ACCENTS[0] if gate.zoomed else COARSE
    verdict = "zoomed in" if gate.zoomed else "coarse view is enough" if not gate.note else "did not zoom"
    number = f"{score:.2f}" if score >= 0.005 or score == 0 else "< 0.01"
    head = _head("Gate", number, width_px, colour)
    draw = ImageDraw.Draw(head)
    draw_text(draw, (width_px - text_width(number, 30, weight="bold") - 18, 4), verdict, BODY_PX, INK, anchor="r")
    bar = blank(width_px, BAR_PX + 44)
    _bar(bar, 8, [(score, colour)])
    if gate.threshold is not None:
        draw = ImageDraw.Draw(bar)
        x = round(min(max(gate.threshold, 0.0), 1.0) * (width_px - 4))
        draw.rounded_rectangle((x, 0, x + 3, BAR_PX + 15), 2, fill=(*INK, 255))
        mark = f"zooms from {gate.threshold:.3g}"
        half = text_width(mark, 20) / 2
        middle = min(max(x + 1.5, half), width_px - half)
        draw_text(draw, (middle, BAR_PX + 20), mark, 20, MUTED, anchor="m")
    return stack([head, bar, *_note(gate.note, width_px)], 10)


def _head(title: str, figure: str, width_px: int, colour: Colour = INK) -> PIL.Image.Image:
    """A small title on the left and a large figure on the right."""
    head = blank(width_px, 36)
    draw = ImageDraw.Draw(head)
    draw_text(draw, (0, 5), title, LABEL_PX, MUTED, weight="bold")
    draw_text(draw, (width_px, 0), figure, 30, colour, weight="bold", anchor="r")
    return head


def _note(text: str, width_px: int) -> list[PIL.Image.Image]:
    return [paragraph(text, width_px, LABEL_PX, MUTED, max_lines=2)] if text else []


def tokens_panel(usage: Usage, native_tokens: int | None, width_px: int) -> PIL.Image.Image:
    """Visual tokens paid, coarse and region, against what all pictures would cost at native resolution, uncapped."""
    paid = usage.coarse_tokens + usage.region_tokens
    head = _head("Visual tokens", f"{paid:,}", width_px)
    whole = max(paid, native_tokens or 0, 1)
    bar = blank(width_px, BAR_PX)
    _bar(bar, 0, [(usage.coarse_tokens / whole, COARSE), (usage.region_tokens / whole, ACCENTS[0])])
    parts = [(f"coarse {usage.coarse_tokens:,}", COARSE)]
    if usage.region_tokens:
        parts.append((f"region {usage.region_tokens:,}", ACCENTS[0]))
    if native_tokens is not None and native_tokens > paid:
        share = paid / native_tokens
        words = f"{share:.0%}" if share >= 0.01 else "under 1%"
        parts.append((f"{words} of the {native_tokens:,} at native resolution", TRACK))
    elif native_tokens is not None:
        parts.append((f"native resolution would take {native_tokens:,}", TRACK))
    return stack([head, bar, _legend(parts, width_px)], 10)


def time_panel(timing_ms: dict[str, float], width_px: int) -> PIL.Image.Image:
    """The time in all, and its largest steps."""
    steps = {name: ms for name, ms in timing_ms.items() if name != "total"}
    total = timing_ms.get("total", sum(steps.values()))
    head = _head("Time", _duration(total), width_px)
    largest = sorted(steps, key=lambda name: -steps[name])[:4]
    words = "  ·  ".join(f"{name.replace('_', ' ')} {_duration(steps[name])}" for name in steps if name in largest)
    return stack([head, *([paragraph(words, width_px, 20, MUTED, max_lines=2)] if words else [])], 6)


def _duration(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 995 else f"{ms:.0f} ms" if ms >= 9.5 else f"{ms:.1f} ms"


def _bar(image: PIL.Image.Image, top: int, parts: Sequence[tuple[float, Colour]]) -> None:
    """A rounded track with coloured shares from the left."""
    width = image.width
    strip = Image.new("RGB", (width, BAR_PX), TRACK)
    draw = ImageDraw.Draw(strip)
    x = 0.0
    for share, colour in parts:
        if share > 0:
            end = min(width, max(x + share * width, x + 4))
            draw.rectangle((round(x), 0, round(end) - 1, BAR_PX), fill=colour)
            x = end
    image.paste(rounded(strip, BAR_PX // 2), (0, top))


def _legend(parts: Sequence[tuple[str, Colour]], width_px: int) -> PIL.Image.Image:
    """Colour dots with words, broken into lines where they do not fit."""
    size, dot = 20, 14
    places: list[tuple[float, int]] = []
    x, row = 0.0, 0
    for text, _ in parts:
        need = dot + 10 + text_width(text, size)
        if x and x + need > width_px:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += need + 28
    out = blank(width_px, (row + 1) * 30)
    draw = ImageDraw.Draw(out)
    for (text, colour), (left, line) in zip(parts, places, strict=True):
        top = line * 30 + 6
        disc = rounded(Image.new("RGB", (dot, dot), colour), dot // 2, HAIRLINE if colour == TRACK else None)
        out.paste(disc, (round(left), top))
        draw_text(draw, (left + dot + 10, top - 3), text, size, MUTED)
    return out
