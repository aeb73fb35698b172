"""Pages of the packs: sheets of printed lines, documents and scenes drawn from a seed, and real receipts.

A sheet is a page full of unrelated lines in bands; every band has a typeface and a print process of its own (dot
matrix, worn thermal head, bold, condensed, letter-spaced, reversed, photocopied). Sheets teach reading; documents and
scenes, drawn by `qzoom.data.synthetic`, teach where answers are. Real receipts come with transcribed lines and boxes.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from qzoom.data.synthetic.documents import render_document
from qzoom.data.synthetic.page import HELD_OUT_SEEDS, FontSet, SyntheticSample, advances, font_paths
from qzoom.data.synthetic.page import Page as Sheet
from qzoom.data.synthetic.scenes import render_scene
from tiny.pack import PackedLine, PackedObject, PackedQuestion, PackHeader, Page
from tiny.sheet_texts import sheet_line
from tiny.typefaces import typeface_digest, typefaces

RENDERER = "3"
"""Raise it whenever a drawn page would look different: packs of another version are refused."""

SOURCES = ("sheets", "documents", "scenes", "sheets_held_out", "documents_held_out", "scenes_held_out")


def pack_header(kind: str, seed: int, count: int) -> PackHeader:
    """The header of a drawn pack; the faces on this machine are part of the renderer's version."""
    faces = "core" if kind.endswith("_held_out") else typeface_digest()
    return PackHeader(kind, f"{RENDERER}-{faces}", seed, count)


def draw_page(kind: str, seed: int, number: int) -> Page:
    """Page `number` of a drawn source."""
    held_out = kind.endswith("_held_out")
    rng = np.random.default_rng([seed, SOURCES.index(kind), number])
    fonts: FontSet = "core"
    if not held_out:
        every, tills = typefaces()
        fonts = tills if rng.random() < 0.5 else every
    picture = int(rng.integers(0, 2**31)) if not held_out else HELD_OUT_SEEDS.start + seed * 10_000 + number
    base = kind.removesuffix("_held_out")
    if base == "sheets":
        return draw_sheet(np.random.default_rng([picture, 5]), fonts, f"sheet-{picture}")
    if base == "documents":
        sample = render_document(picture, font_set=fonts, reword=not held_out)
        return page_of_sample(sample, grey=sample.kind == "receipt" or rng.random() < 0.7)
    return page_of_sample(render_scene(picture, font_set=fonts, reword=not held_out), grey=False)


def page_of_sample(sample: SyntheticSample, *, grey: bool) -> Page:
    """A drawn sample as a page; a picture without colour is kept grey."""
    pixels = np.asarray(sample.image)
    if grey and not any(question.field.startswith("stamp_") for question in sample.questions):
        pixels = np.asarray(sample.image.convert("L"))
    lines = [PackedLine(line.text, _around(line.char_boxes_px), line.char_boxes_px) for line in sample.lines]
    questions = [
        PackedQuestion(
            q.field, q.question, q.answer, q.boxes, bool(q.easy), tuple((s.line, s.start, s.stop) for s in q.spans)
        )
        for q in sample.questions
    ]
    objects = tuple(PackedObject(o.colour, o.shape, o.box) for o in sample.objects) if sample.kind == "scene" else None
    return Page(pixels, sample.kind, f"{sample.kind}-{sample.seed}", tuple(lines), tuple(questions), objects)


def _around(boxes: np.ndarray) -> tuple[int, int, int, int]:
    if not len(boxes):
        return (0, 0, 1, 1)
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    return (int(low[0]), int(low[1]), int(np.ceil(high[0])), int(np.ceil(high[1])))


def draw_sheet(rng: np.random.Generator, fonts: FontSet, name: str) -> Page:
    """A grey sheet of 20 to 40 lines in bands of one to six."""
    paths = font_paths(fonts)
    width, height = int(rng.integers(560, 900)), int(rng.integers(900, 1300))
    paper = int(rng.integers(205, 256))
    whole = np.full((height, width), paper, dtype=np.uint8)
    lines: list[PackedLine] = []
    y = int(rng.integers(4, 30))
    while y < height - 60:
        band, found = _band(rng, paths[int(rng.integers(len(paths)))], width, paper)
        if y + band.shape[0] > height:
            break
        whole[y : y + band.shape[0]] = band
        move = np.array([0, y, 0, y], dtype=np.float32)
        lines += [PackedLine(text, _around(boxes + move), boxes + move) for text, boxes in found]
        y += band.shape[0] + int(rng.integers(0, 12))
    noise = rng.normal(0, rng.uniform(0, 10), (256, 256))
    grain = np.tile(noise, (height // 256 + 1, width // 256 + 1))[:height, :width]
    return Page(np.clip(whole + grain, 0, 255).astype(np.uint8), "sheet", name, tuple(lines))


def _band(
    rng: np.random.Generator, path: str, width: int, paper: int
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Some lines in one face and process: pixels (h, width) and the lines with their character boxes."""
    size = int(np.exp(rng.uniform(np.log(17), np.log(46))))
    stretch = float(rng.choice([1.0, 1.0, 1.0, rng.uniform(0.62, 1.0), rng.uniform(1.0, 1.6)]))
    spread = float(rng.choice([1.0, 1.0, 1.0, rng.uniform(1.0, 1.35)]))
    pitch = size * rng.uniform(1.02, 1.5)
    count = int(rng.integers(1, 7))
    drawn_width = int(width / stretch)
    sheet = Sheet(drawn_width, int(pitch * count + 0.45 * size), 255)
    for number in range(count):
        _print_row(rng, sheet, path, size, (number * pitch + 0.05 * size, spread))
    sheet.transform(width / drawn_width, 1.0, 0.0, 255)
    ink = _process(rng, 255 - np.asarray(sheet.image.convert("L").resize((width, sheet.image.size[1]))), size)
    depth = (paper - float(rng.choice([rng.uniform(0, 60), rng.uniform(60, 150)]))) / 255
    band = paper - ink * depth
    if rng.random() < 0.04:
        band = 255 - band
    return np.clip(band, 0, 255).astype(np.uint8), [(line.text, line.char_boxes_px) for line in sheet.lines]


def _print_row(rng: np.random.Generator, sheet: Sheet, path: str, size: int, place: tuple[float, float]) -> None:
    """One row of texts from left to right, until one does not fit any more."""
    top, spread = place
    width = sheet.image.size[0]
    x = float(rng.uniform(2, 60))
    while True:
        text = sheet_line(rng)
        wide = float(advances(path, size, text).sum()) * spread
        if x + wide > width - 4:
            return
        sheet.print(x, top, text, path, size, fill=0, spread=spread)
        x += wide + size * float(rng.uniform(1.2, 6))
        if rng.random() < 0.3:
            return


def _process(rng: np.random.Generator, ink: np.ndarray, size: int) -> np.ndarray:
    """The ink layer (h, w), 0 to 255, as one of several printers would leave it, float32."""
    kind = rng.random()
    image = Image.fromarray(ink.astype(np.uint8))
    if kind < 0.16:  # dot matrix: round dots on a grid
        step = max(2, round(size / rng.uniform(9, 14)))
        rows, columns = np.mgrid[0 : ink.shape[0], 0 : ink.shape[1]] % step
        dots = np.hypot(rows - (step - 1) / 2, columns - (step - 1) / 2) <= step * rng.uniform(0.42, 0.62)
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(step / 3)), dtype=np.float32)
        return np.where(blurred > 70, 255, 0) * dots * 1.0
    if kind < 0.26:
        image = image.filter(ImageFilter.MaxFilter(3))
    elif kind < 0.34 and size > 24:
        image = image.filter(ImageFilter.MinFilter(3))
    out = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.45:  # a worn thermal head: speckles and pale rows
        speck = rng.random((ink.shape[0] // 2 + 1, ink.shape[1] // 2 + 1)) < rng.uniform(0.02, 0.3)
        out = out * (
            1 - rng.uniform(0.4, 1.0) * np.repeat(np.repeat(speck, 2, 0), 2, 1)[: ink.shape[0], : ink.shape[1]]
        )
    if rng.random() < 0.15:
        out = out * (1 - rng.uniform(0.2, 0.7) * (rng.random((ink.shape[0], 1)) < 0.15))
    if rng.random() < 0.12:
        out = out * (1 - rng.uniform(0.5, 1.0) * (rng.random((1, ink.shape[1])) < 0.02))
    if rng.random() < 0.3:
        radius = float(rng.uniform(0.4, max(0.5, size / 28)))
        out = np.asarray(Image.fromarray(out.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius)), np.float32)
        if rng.random() < 0.4:  # photocopied: thresholded after the blur
            out = np.clip((out - rng.uniform(60, 140)) * 5, 0, 255)
    return out
