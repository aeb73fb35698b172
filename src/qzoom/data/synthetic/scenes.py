"""Synthetic scenes: large images with many small labelled objects.

Every object has a colour, a shape and a printed code. Questions ask for the code, the colour, counts, existence, and
which of two objects is further left. Codes are fine print; everything else is visible in the coarse view. Sides are
1024 to 2048 px long.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import ImageDraw

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.page import (
    FontSet,
    Page,
    ScanStyle,
    SceneObject,
    SyntheticQuestion,
    SyntheticSample,
    TextSpan,
    age,
    font_paths,
    load_font,
    span_box,
)
from qzoom.data.synthetic.texts import COLOURS, SHAPES, ask

_GROUNDS = {"white": (244, 244, 240), "grey": (150, 152, 155), "brown": (150, 115, 80), "cyan": (150, 205, 210)}


def render_scene(
    seed: int,
    *,
    width_px: int | None = None,
    height_px: int | None = None,
    grid: tuple[int, int] | None = None,
    fill: tuple[float, float] = (0.28, 0.55),
    font_set: FontSet = "core",
    reword: bool = True,
) -> SyntheticSample:
    """The scene of a seed; size and grid (columns, rows of places) are drawn unless given, objects take between the two
    shares `fill` of their place's shorter side."""
    rng = np.random.default_rng([seed, 37])
    sides = rng.integers(1024, 2049, size=2)
    width, height = width_px or int(sides[0]), height_px or int(sides[1])
    places = rng.integers(2, 6, size=2)
    columns, rows = grid or (int(places[0]), int(places[1]))
    ground = str(rng.choice(list(_GROUNDS)))
    page = Page(width, height, _GROUNDS[ground])
    things = _things(page, rng, (columns, rows), fill, font_set)
    style = ScanStyle(blur_px=float(rng.choice([0.0, 0.0, 0.8])), noise=float(rng.uniform(0, 8)))
    image = age(page.image, style, rng)
    wording = rng if reword else None
    questions = _questions(page, things, rng, wording)
    whole = ((0, 0, width, height),)
    questions.append(SyntheticQuestion("background", ask("background", wording), ground, whole, True))
    return SyntheticSample(image, tuple(questions), "scene", seed, tuple(page.lines), tuple(things))


def _things(
    page: Page, rng: np.random.Generator, grid: tuple[int, int], fill: tuple[float, float], font_set: FontSet
) -> list[SceneObject]:
    """Objects on a jittered grid; no colour and shape pair appears twice."""
    columns, rows = grid
    width, height = page.image.size
    cell_w, cell_h = width / columns, height / rows
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    order = rng.permutation(len(pairs))
    places = rng.permutation(columns * rows)
    count = max(1, round(columns * rows * rng.uniform(0.55, 1.0)))
    path = font_paths(font_set)[int(rng.integers(len(font_paths(font_set))))]
    things = []
    for index in range(min(count, len(pairs))):
        colour, shape = pairs[int(order[index])]
        row, column = divmod(int(places[index]), columns)
        side = rng.uniform(*fill) * min(cell_w, cell_h)
        x = (column + rng.uniform(0.1, 0.9)) * cell_w
        y = (row + rng.uniform(0.1, 0.9)) * cell_h
        x = float(np.clip(x, column * cell_w + 0.6 * side, (column + 1) * cell_w - 0.6 * side))
        y = float(np.clip(y, row * cell_h + 0.55 * side, (row + 1) * cell_h - 0.95 * side))
        things.append(_thing(page, rng, (colour, shape), (x, y, side), path))
    return things


def _thing(
    page: Page, rng: np.random.Generator, kind: tuple[str, str], place: tuple[float, float, float], path: str
) -> SceneObject:
    """Draw one object and, on a white tag below it, its code in print of 12 to 40 px."""
    colour, shape = kind
    x, y, side = place
    half = side / 2
    _shape(page.draw, shape, (x, y), half, COLOURS[colour])
    text = texts.code(rng, 2, 5)
    size = int(np.clip(side * rng.uniform(0.16, 0.34), 15, 52))
    while size > 13 and load_font(path, size).getlength(text) > 1.15 * side:
        size -= 1
    wide = load_font(path, size).getlength(text)
    top = y + half + 0.05 * side
    tag = (int(x - wide / 2 - 0.3 * size), int(top), int(x + wide / 2 + 0.3 * size), int(top + 1.35 * size))
    page.draw.rectangle(tag, fill=(255, 255, 255), outline=(60, 60, 60), width=max(1, size // 14))
    line = page.print(x, top + 0.08 * size, text, path, size, fill=(20, 20, 20), align="center")
    left, right = int(min(x - half, tag[0])), math.ceil(max(x + half, tag[2]))
    width, height = page.image.size
    box = (max(0, left), max(0, int(y - half)), min(width, right), min(height, tag[3]))
    return SceneObject(colour, shape, box, text, TextSpan(line, 0, len(text)), (left + right) / 2)


def _shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], half: float, fill: tuple[int, int, int]
) -> None:
    """One filled shape of half-width `half`."""
    x, y = centre
    edge = (40, 40, 40)
    if shape == "circle":
        draw.ellipse([x - half, y - half, x + half, y + half], fill=fill, outline=edge)
        return
    if shape == "star":
        angles = [math.pi * (0.2 * i - 0.5) for i in range(10)]
        points = [
            (x + math.cos(a) * half * (1, 0.42)[i % 2], y + math.sin(a) * half * (1, 0.42)[i % 2])
            for i, a in enumerate(angles)
        ]
    else:
        outlines: dict[str, list[tuple[float, float]]] = {
            "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
            "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
            "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
            "cross": [
                *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
                *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
            ],
        }
        points = [(x + dx * half, y + dy * half) for dx, dy in outlines[shape]]
    draw.polygon(points, fill=fill, outline=edge)


def _questions(
    page: Page, things: list[SceneObject], rng: np.random.Generator, wording: np.random.Generator | None
) -> list[SyntheticQuestion]:
    """Codes of up to six objects (hard), then colour, counts, existence and sides (coarse views suffice for most)."""
    questions = []
    for index in rng.permutation(len(things))[:6]:
        thing = things[int(index)]
        box = span_box(page.lines, thing.span)
        asked = ask("code", wording, colour=thing.colour, shape=thing.shape)
        questions.append(SyntheticQuestion("code", asked, thing.code, (box,), False, spans=(thing.span,)))
    thing = things[int(rng.integers(len(things)))]
    asked = ask("colour_of", wording, shape=thing.shape, code=thing.code)
    questions.append(SyntheticQuestion("colour_of", asked, thing.colour, (thing.box,), False))
    shape = str(rng.choice(SHAPES))
    held = tuple(thing.box for thing in things if thing.shape == shape)
    several = shape + ("es" if shape.endswith("s") else "s")
    questions.append(SyntheticQuestion("count", f"How many {several} are there?", str(len(held)), held, True))
    questions.append(_exists(things, rng, wording))
    if len(things) > 1:
        first, second = (things[int(i)] for i in rng.choice(len(things), size=2, replace=False))
        gap = first.middle_px - second.middle_px
        if abs(gap) > 0.05 * page.image.size[0]:
            asked = ask(
                "side", wording, colour=first.colour, shape=first.shape, colour2=second.colour, shape2=second.shape
            )
            answer = "left" if gap < 0 else "right"
            questions.append(SyntheticQuestion("side", asked, answer, (first.box, second.box), True))
    return questions


def _exists(
    things: list[SceneObject], rng: np.random.Generator, wording: np.random.Generator | None
) -> SyntheticQuestion:
    """Whether a named object is there; half of the answers are yes."""
    shown = {(thing.colour, thing.shape): thing.box for thing in things}
    if rng.random() < 0.5:
        pair = list(shown)[int(rng.integers(len(shown)))]
    else:
        pair = (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
    box = shown.get(pair)
    asked = ask("exists", wording, colour=pair[0], shape=pair[1])
    return SyntheticQuestion("exists", asked, "yes" if box else "no", (box,) if box else (), True)
