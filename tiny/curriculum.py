"""The exercises the embedded model is trained on, and how a step's examples are drawn from the packs.

Every exercise turns a generator into a few examples cut from packed pages (only `cards` and `places` are drawn on the
spot). Names say where the pages come from (`real`, `sheet`, `document`, `scene`) and what is cut:

- *_line: one printed line at any size from 14 to 90 px, "What does it say?";
- *_strip: two to four neighbouring rows, "What does line 2 say?";
- *_window: a part of any size between a few lines and the page, asked about what it shows;
- *_views: the same parts without a question, for the vision tower alone (guides only, no decoder: many a second);
- *_pair: the coarse view plus a region crop, as in a zoom (around known places, or where a region branch looks);
- *_page: a single view at any of the resolutions; `album`: several pages in one question;
- cards: a small readable scene; places: a scene at coarse resolution, which trains locating.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from qzoom.data.questions import RECEIPT_FIELDS, with_its_row
from qzoom.data.synthetic.page import HELD_OUT_SEEDS, TRAIN_SEEDS, FontSet
from qzoom.data.synthetic.scenes import render_scene
from qzoom.data.synthetic.texts import ask
from qzoom.errors import ConfigError
from tiny.batch import Example, Query
from tiny.draw_pages import page_of_sample
from tiny.exchange import exchange_values
from tiny.model import TOKEN_PX
from tiny.pack import Box, Pack, PackedLine, PackedQuestion, Page
from tiny.proposals import Proposals
from tiny.receipt_data import rows_of
from tiny.render_views import Look, View, crop_around, fit_to_tokens, random_look, region_tokens, snippet_box
from tiny.respell import respell, respell_company
from tiny.view_targets import build_example, glyphs_in

LADDER = (64, 100, 128, 144, 196, 256, 288, 400, 512, 1024)
"""Visual-token budgets of the plain look that evaluation uses."""

_LONGEST_LINE = 18
_PROPOSED_SHARE = 0.6
_WHOLE_PAGE = ("kind", "stamp", "stamp_colour", "background")
_SOURCES = {"real": "receipts", "sheet": "sheets", "document": "documents", "scene": "scenes"}


@dataclass(frozen=True, slots=True)
class Context:
    """What an exercise draws from: the packs by name, a generator, whether to measure (held-out pages, no degraded
    looks, standard wording) instead of train, boxes that a region branch proposed, and the shares of real receipts
    whose values are exchanged and whose letters change places."""

    packs: dict[str, Pack]
    rng: np.random.Generator
    held_out: bool = False
    proposals: Proposals = field(default_factory=dict)
    exchanged: float = 0.0
    respelled: float = 0.0

    def page(self, source: str, *, to_spell: bool = False) -> Page:
        """A page of a source; `to_spell`: its lines are to be read, and nothing else. Only real pages of training
        change: there are few of them, and what is measured stays as printed."""
        page = self._packed(source)
        if source != "real" or self.held_out:
            return page
        if self.exchanged and self.rng.random() < self.exchanged:
            page = exchange_values(page, self._packed(source), self.rng)
        if self.respelled and self.rng.random() < self.respelled:
            page = respell(page, self.rng) if to_spell else respell_company(page, self.rng)
        return page

    def _packed(self, source: str) -> Page:
        pack = self.packs[f"{_SOURCES[source]}_{'held_out' if self.held_out else 'train'}"]
        return pack[int(self.rng.integers(len(pack)))]

    def look(self, *, turn: bool = True) -> Look:
        """A look to show a view with."""
        return Look() if self.held_out else random_look(self.rng, turn=turn)

    def between(self, low: float, high: float) -> float:
        """A size, even on the logarithmic scale."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def some(self, questions: list[PackedQuestion], count: int) -> list[PackedQuestion]:
        """At most `count` questions in random order, the receipts' three fields first more often."""
        weight = np.array([3.0 if q.field in RECEIPT_FIELDS else 1.0 for q in questions])
        order = np.argsort(-weight * self.rng.random(len(questions)) ** 0.5)
        return [questions[int(i)] for i in order[:count]]

    def wording(self) -> np.random.Generator | None:
        """A generator for wordings; none for the standard ones."""
        return None if self.held_out else self.rng


Exercise = Callable[[Context], list[Example]]


def _text_question(context: Context, page: Page, rows: list[list[int]], number: int) -> PackedQuestion:
    """Read row `number` (of the shown ones), or the only text; now and then in capitals."""
    texts = [page.lines[index].text for index in rows[number]]
    capitals = page.capitals or (not context.held_out and context.rng.random() < 0.25)
    wording = context.wording()
    asked = ask("text", wording) if len(rows) == 1 else ask("line", wording, n=str(number + 1))
    answer = " ".join(texts)
    if capitals and re.search("[A-Za-z]", answer):
        asked, answer = re.sub(r"([?.])$", r" in capitals\1", asked), answer.upper()
    spans = tuple((index, 0, len(page.lines[index].text)) for index in rows[number])
    return PackedQuestion("text", asked, answer, tuple(page.lines[index].box for index in rows[number]), False, spans)


def _line_view(context: Context, page: Page, box: Box, row_px: float, text_px: float) -> View:
    """A crop around `box`, whose rows are `row_px` high in the page and `text_px` in the view, with jitter in size,
    place and shape. What is asked stays in the middle, so that neighbours cannot be meant."""
    rng = context.rng
    high, wide = box[3] - box[1], box[2] - box[0]
    scale = min(text_px / row_px, _LONGEST_LINE * TOKEN_PX / (wide * 1.03))
    stretch = 1.0 if context.held_out else float(rng.uniform(0.87, 1.15))
    margins = (rng.uniform(0.0, 0.4, 4) if not context.held_out else np.full(4, 0.15)) * row_px
    margins[rng.random(4) < (0.0 if context.held_out else 0.06)] *= -0.15
    need = ((wide + margins[0] + margins[2]) * scale * stretch, (high + margins[1] + margins[3]) * scale)
    tokens = (max(1, int(np.ceil(need[0] / TOKEN_PX - 0.25))), max(1, int(np.ceil(need[1] / TOKEN_PX - 0.3))))
    spare_x = max(0.0, tokens[0] * TOKEN_PX - need[0]) / (scale * stretch)
    spare_y = max(0.0, tokens[1] * TOKEN_PX - need[1]) / scale
    left, top = (0.5, 0.5) if context.held_out else (rng.uniform(0, 1), rng.uniform(0.4, 0.6))
    outer = (
        box[0] - margins[0] - spare_x * left,
        box[1] - margins[1] - spare_y * top,
        box[2] + margins[2] + spare_x * (1 - left),
        box[3] + margins[3] + spare_y * (1 - top),
    )
    return View(page.pixels, outer, tokens, context.look(), rng)


def _lines(source: str, count: int, *, asked: bool = True) -> Exercise:
    def build(context: Context) -> list[Example]:
        examples: list[Example] = []
        task = f"{source}_line"
        page = context.page(source, to_spell=True)
        while len(examples) < count:
            if len(examples) % 4 == 0:
                page = context.page(source, to_spell=True)
            line = int(context.rng.integers(max(1, len(page.lines))))
            if line >= len(page.lines) or not _readable(page.lines[line]):
                page = context.page(source, to_spell=True)
                continue
            text_px = context.between(14, 36) if context.rng.random() < 0.65 else context.between(30, 90)
            box = page.lines[line].box
            view = _line_view(context, page, box, box[3] - box[1], text_px)
            questions = [_text_question(context, page, [[line]], 0)] if asked else []
            examples.append(build_example(task, [view], page, questions))
        return examples

    return build


def _readable(line: PackedLine) -> bool:
    text = line.text.strip("-=*_. ")
    return len(text) > 0 and len(line.text) <= 44 and line.box[3] - line.box[1] >= 6


def _strips(source: str, count: int) -> Exercise:
    def build(context: Context) -> list[Example]:
        examples: list[Example] = []
        while len(examples) < count:
            page = context.page(source, to_spell=True)
            rows = rows_of(page.lines)
            want = int(context.rng.integers(2, 5))
            if len(rows) < want:
                continue
            first = int(context.rng.integers(len(rows) - want + 1))
            rows = rows[first : first + want]
            boxes = np.array([page.lines[index].box for row in rows for index in row])
            box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
            tallest = float(np.median(boxes[:, 3] - boxes[:, 1]))
            if box[3] - box[1] > 3.0 * want * tallest:
                continue
            view = _line_view(context, page, box, tallest, context.between(13, 30))
            shown = [n for n, row in enumerate(rows) if sum(len(page.lines[i].text) for i in row) <= 44]
            numbers = [shown[int(i)] for i in context.rng.permutation(len(shown))[:3]]
            questions = [_text_question(context, page, rows, number) for number in numbers]
            if questions:
                examples.append(build_example(f"{source}_strip", [view], page, questions))
        return examples

    return build


def _windows(source: str, count: int, *, asked: bool = True) -> Exercise:
    """Parts of a page with text 9 to 40 px high."""

    def build(context: Context) -> list[Example]:
        rng = context.rng
        examples: list[Example] = []
        shapes = [(6, 3), (8, 3), (8, 4), (6, 5), (10, 3), (7, 4), (12, 4), (9, 6), (6, 6), (12, 8)]
        for _ in range(20 * count):
            if len(examples) == count:
                break
            page = context.page(source)
            known = [q for q in page.questions if q.boxes and q.field not in _WHOLE_PAGE]
            if asked and not known:
                continue
            tokens = shapes[int(rng.integers(len(shapes)))]
            question = context.some(known, 1)[0] if asked else None
            target = _target(context, page, question)
            if target is None:
                continue
            if question is not None and rng.random() < 0.3:
                target = with_its_row(target, [line.box for line in page.lines])
            box = snippet_box(target, page.pixels.shape[1::-1], context.between(9, 40), tokens, rng)
            view = View(page.pixels, box, tokens, context.look(), rng)
            questions = []
            if question is not None:
                others = [q for q in known if q is not question and _inside(q, box)]
                questions = [question, *context.some(others, 3)]
            examples.append(build_example(f"{source}_window", [view], page, questions))
        return examples

    return build


def _target(context: Context, page: Page, question: PackedQuestion | None) -> Box | None:
    """What a window must show: a place that holds the answer, or the middle of any line."""
    rng = context.rng
    if question is not None:
        return question.boxes[int(rng.integers(len(question.boxes)))]
    lines = [line for line in page.lines if _readable(line)]
    if not lines:
        return None
    x0, y0, x1, y1 = lines[int(rng.integers(len(lines)))].box
    middle = (x0 + x1) // 2
    return (max(0, middle - 20), y0, middle + 20, y1)


def _inside(question: PackedQuestion, box: tuple[float, float, float, float]) -> bool:
    """Whether some place that holds the answer lies inside the box (two pixels of slack)."""
    return any(
        b[0] >= box[0] - 2 and b[1] >= box[1] - 2 and b[2] <= box[2] + 2 and b[3] <= box[3] + 2 for b in question.boxes
    )


def _pairs(source: str, count: int) -> Exercise:
    """Coarse look and region crop together."""

    def build(context: Context) -> list[Example]:
        rng = context.rng
        examples: list[Example] = []
        for _ in range(20 * count):
            if len(examples) == count:
                break
            page = context.page(source)
            known = [q for q in page.questions if q.boxes and q.field not in _WHOLE_PAGE]
            if not known:
                continue
            height, width = page.pixels.shape[:2]
            tokens = fit_to_tokens(width, height, int(rng.choice([64, 64, 100, 144])))
            question = context.some(known, 1)[0]
            box, proposed = region_box(context, page, question, width / tokens[0])
            look = context.look(turn=False)
            views = [View(page.pixels, None, tokens, look, rng)]
            views.append(View(page.pixels, box, region_tokens(box, rng), look, rng))
            others = [q for q in known if q is not question and _inside(q, box)]
            asked = [question, *context.some(others, 1 if proposed else 3)]
            examples.append(build_example(f"{source}_pair", views, page, asked))
        return examples

    return build


def region_box(
    context: Context, page: Page, question: PackedQuestion, cell_px: float
) -> tuple[tuple[float, float, float, float], bool]:
    """What a zoom reads, and whether a region branch proposed it: the proposed box, its edges moved by up to half a
    cell, in a share of the cases where it holds the answer, and else a box around a known place or its row."""
    rng = context.rng
    height, width = page.pixels.shape[:2]
    proposed = context.proposals.get((page.name, question.question))
    if proposed is not None and rng.random() < _PROPOSED_SHARE:
        moved = np.array(proposed) + rng.uniform(-0.5, 0.5, 4) * cell_px
        x0, y0, x1, y1 = np.clip(np.round(moved), 0, (width, height, width, height)).tolist()
        if _inside(question, (x0, y0, x1, y1)):
            return (x0, y0, x1, y1), True
    target = question.boxes[int(rng.integers(len(question.boxes)))]
    if rng.random() < 0.5:
        target = with_its_row(target, [line.box for line in page.lines])
    return crop_around(target, (width, height), rng, cell_px), False


def _pages(source: str, budgets: tuple[int, ...], token_total: int) -> Exercise:
    """The plain look at one of the budgets; as many pictures as `token_total` visual tokens hold."""

    def build(context: Context) -> list[Example]:
        budget = int(context.rng.choice(budgets))
        examples = []
        for _ in range(max(1, token_total // budget)):
            page = context.page(source)
            height, width = page.pixels.shape[:2]
            tokens = fit_to_tokens(width, height, budget)
            view = View(page.pixels, None, tokens, context.look(turn=False), context.rng)
            examples.append(build_example(f"{source}_page", [view], page, context.some(list(page.questions), 6)))
        return examples

    return build


def _album(context: Context) -> list[Example]:
    """Two to five pages at a coarse look, then a crop of the one that holds the answer; the question names something
    that only one of them shows."""
    rng = context.rng
    count = int(rng.integers(2, 6))
    pages = [context.page("document") for _ in range(count)]
    chosen = int(rng.integers(count))
    elsewhere = {q.question for n, page in enumerate(pages) if n != chosen for q in page.questions}
    page = pages[chosen]
    known = [q for q in page.questions if q.boxes and q.field not in _WHOLE_PAGE and q.question not in elsewhere]
    if not known:
        return []
    question = context.some(known, 1)[0]
    views = []
    for each in pages:
        height, width = each.pixels.shape[:2]
        tokens = fit_to_tokens(width, height, 64)
        views.append(View(each.pixels, None, tokens, context.look(turn=False), rng))
    height, width = page.pixels.shape[:2]
    box = crop_around(question.boxes[0], (width, height), rng, width / fit_to_tokens(width, height, 64)[0])
    crop = View(page.pixels, box, region_tokens(box, rng), context.look(turn=False), rng)
    shown = build_example("album", [views[chosen], crop], page, [question])
    points = shown.queries[0].points
    if points is not None:
        spread = np.full((len(points), count + 1, 2), np.nan, dtype=np.float32)
        spread[:, [chosen, count]] = points
        points = spread
    glyphs = [glyphs_in(view, each.lines) for view, each in zip(views, pages, strict=True)]
    query = Query(question.question, question.answer, points)
    return [Example("album", tuple(v.pixels for v in [*views, crop]), (*glyphs, shown.glyphs[1]), (query,))]


def _drawn_scenes(count: int, *, coarse: bool) -> Exercise:
    """Scenes drawn on the spot: `cards`, one to six objects with readable codes, or `places`, a coarse look."""

    def build(context: Context) -> list[Example]:
        rng = context.rng
        span = HELD_OUT_SEEDS if context.held_out else TRAIN_SEEDS
        fonts: FontSet = "core" if context.held_out else "train"
        sizes = [(5, 4), (6, 6), (8, 5), (8, 8), (10, 6)]
        width, height = sizes[int(rng.integers(5))]
        if coarse:
            sides = rng.uniform(1024, 2049, 2)
            width, height = fit_to_tokens(float(sides[0]), float(sides[1]), int(rng.choice([64, 100, 144])))
        grid = None if coarse else (int(rng.integers(1, width // 3 + 1)), int(rng.integers(1, height // 3 + 1)))
        times = TOKEN_PX * (2 if coarse else 1)
        examples = []
        for _ in range(count):
            sample = render_scene(
                int(rng.integers(span.start, span.stop)),
                width_px=width * times,
                height_px=height * times,
                grid=grid,
                fill=(0.28, 0.55) if coarse else (0.4, 0.6),
                font_set=fonts,
                reword=not context.held_out,
            )
            page = page_of_sample(sample, grey=False)
            view = View(page.pixels, None, (width, height))
            shown = context.some(list(page.questions), 6)
            examples.append(build_example("places" if coarse else "cards", [view], page, shown))
        return examples

    return build


EXERCISES: dict[str, Exercise] = {
    "real_views": _windows("real", 4, asked=False),
    "sheet_views": _windows("sheet", 4, asked=False),
    "document_views": _windows("document", 4, asked=False),
    "real_lines_seen": _lines("real", 16, asked=False),
    "sheet_lines_seen": _lines("sheet", 16, asked=False),
    "real_line": _lines("real", 16),
    "sheet_line": _lines("sheet", 16),
    "document_line": _lines("document", 16),
    "real_strip": _strips("real", 6),
    "sheet_strip": _strips("sheet", 6),
    "real_window": _windows("real", 4),
    "document_window": _windows("document", 4),
    "real_pair": _pairs("real", 2),
    "document_pair": _pairs("document", 2),
    "scene_pair": _pairs("scene", 2),
    "real_page": _pages("real", LADDER[:-1], 600),
    "document_page": _pages("document", LADDER[:-1], 600),
    "document_page_1024": _pages("document", LADDER[-1:], 1024),
    "scene_page": _pages("scene", LADDER[:-1], 600),
    "scene_page_1024": _pages("scene", LADDER[-1:], 1024),
    "album": _album,
    "cards": _drawn_scenes(4, coarse=False),
    "places": _drawn_scenes(4, coarse=True),
}


def packs_needed(exercises: Iterable[str]) -> set[str]:
    """The sources whose packs these exercises read: "receipts", "sheets", "documents", "scenes"."""
    names = set()
    for exercise in exercises:
        first = exercise.partition("_")[0]
        if exercise == "album":
            names.add("documents")
        elif first in _SOURCES:
            names.add(_SOURCES[first])
    return names


def examples_of(exercise: str, context: Context) -> list[Example]:
    """A few examples of an exercise."""
    if exercise not in EXERCISES:
        raise ConfigError(f"There is no exercise `{exercise}`; known: {', '.join(EXERCISES)}.")
    return EXERCISES[exercise](context)
