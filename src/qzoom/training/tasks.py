"""The tasks that the embedded model is trained on (its curriculum), and how a step's examples are drawn.

A task turns a random generator into a small batch of examples of about the same size. Every task draws image seeds from
the training range, or from the held-out range for evaluation. One rendered document or scene gives several examples.

- glyphs: densely printed views without a question, for the vision tower alone;
- tags, line, strip: read one to four printed lines on a small image;
- snippet: questions about a readable crop of a document; cards: questions about a small, readable scene;
- receipt_*: the same on real receipts;
- places: a scene at coarse resolution, with questions mostly about codes too small to read there: trains locating;
- pair: coarse view and region crop, as in a zoom, with questions about the region;
- page_N, scene_N: a single view of N visual tokens, any question.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qzoom.data.synthetic.documents import render_document, render_strip
from qzoom.data.synthetic.page import (
    HELD_OUT_SEEDS,
    TRAIN_SEEDS,
    FontSet,
    SceneObject,
    SyntheticQuestion,
    SyntheticSample,
)
from qzoom.data.synthetic.scenes import render_scene
from qzoom.errors import ConfigError
from qzoom.training.batch import Example
from qzoom.training.crops import crop_around, inside, region_tokens, snippet_box
from qzoom.training.patches import fit_to_tokens
from qzoom.training.receipts import ReceiptSet, receipt_examples
from qzoom.training.tiny import TOKEN_PX
from qzoom.training.views import build_example, cut_view

__all__ = ["LADDER", "TASKS", "TaskContext", "make_examples"]

LADDER = (64, 128, 144, 256, 288, 512, 1024)
"""Visual-token budgets of the plain look that evaluation uses."""

_WHOLE_PAGE = ("kind", "stamp", "stamp_colour", "background")


class TaskContext:
    """What a task draws from: a generator for contents, one for sizes (the same on every process, so that all are
    busy equally long), the seed range and the typefaces that go with it."""

    def __init__(
        self,
        rng: np.random.Generator,
        sizes: np.random.Generator,
        *,
        held_out: bool,
        receipts: ReceiptSet | None = None,
    ) -> None:
        self.rng = rng
        self.receipts = receipts
        self.sizes = sizes
        self.held_out = held_out
        self.font_set: FontSet = "core" if held_out else "train"

    def seed(self) -> int:
        """A picture seed from the declared range."""
        span = HELD_OUT_SEEDS if self.held_out else TRAIN_SEEDS
        return int(self.rng.integers(span.start, span.stop))

    def document(self) -> SyntheticSample:
        """A fresh document."""
        return render_document(self.seed(), font_set=self.font_set, reword=not self.held_out)

    def scene(self) -> SyntheticSample:
        """A fresh scene."""
        return render_scene(self.seed(), font_set=self.font_set, reword=not self.held_out)

    def some(self, questions: list[SyntheticQuestion], count: int) -> list[SyntheticQuestion]:
        """At most `count` of the questions in random order, the receipts' three fields first more often."""
        weight = np.array([3.0 if q.field in ("total", "date", "company") else 1.0 for q in questions])
        order = np.argsort(-weight * self.rng.random(len(questions)) ** 0.5)
        return [questions[int(i)] for i in order[:count]]


Task = Callable[[TaskContext], list[Example]]


def _strips(sizes: list[tuple[int, int]], count: int, max_lines: int, rows_share: float) -> Task:
    def build(context: TaskContext) -> list[Example]:
        width, height = sizes[int(context.sizes.integers(len(sizes)))]
        examples = []
        for _ in range(count):
            sample = render_strip(
                context.seed(),
                width_px=width * TOKEN_PX,
                height_px=height * TOKEN_PX,
                max_lines=min(max_lines, 2 * height),
                rows_share=rows_share,
                font_set=context.font_set,
            )
            view = cut_view(sample.image, None, (width, height))
            examples.append(build_example("strip", [view], sample.lines, list(sample.questions)))
        return examples

    return build


def _snippets(pictures: int, per_picture: int) -> Task:
    """Crops of documents with text 13 to 36 px high, all views of a batch of one size."""

    def build(context: TaskContext) -> list[Example]:
        rng = context.rng
        tokens = [(6, 3), (8, 3), (8, 4), (6, 5), (10, 3), (7, 4)][int(context.sizes.integers(6))]
        examples = []
        for _ in range(pictures):
            sample = context.document()
            asked = [q for q in sample.questions if q.spans]
            for question in context.some(asked, per_picture):
                text_px = float(np.exp(rng.uniform(np.log(13), np.log(36))))
                box = snippet_box(question.boxes[0], sample.image.size, text_px, tokens, rng)
                shown = [q for q in asked if q is not question and inside(q, box)]
                shown = [question, *context.some(shown, 3)]
                view = cut_view(sample.image, box, tokens)
                examples.append(build_example("snippet", [view], sample.lines, shown))
        return examples

    return build


def _cards(count: int) -> Task:
    """Small scenes of one to six objects with readable codes: where binding a code to its object is learned."""

    def build(context: TaskContext) -> list[Example]:
        rng = context.rng
        width, height = [(5, 4), (6, 6), (8, 5), (8, 8), (10, 6)][int(context.sizes.integers(5))]
        examples = []
        for _ in range(count):
            grid = (int(rng.integers(1, width // 3 + 1)), int(rng.integers(1, height // 3 + 1)))
            sample = render_scene(
                context.seed(),
                width_px=width * TOKEN_PX,
                height_px=height * TOKEN_PX,
                grid=grid,
                fill=(0.4, 0.6),
                font_set=context.font_set,
                reword=not context.held_out,
            )
            view = cut_view(sample.image, None, (width, height))
            shown = context.some(list(sample.questions), 6)
            examples.append(build_example("cards", [view], sample.lines, shown, objects=sample.objects))
        return examples

    return build


def _places(budgets: tuple[int, ...], token_total: int) -> Task:
    """Scenes at coarse views, rendered at twice the look's size (cheaper than a full scene)."""

    def build(context: TaskContext) -> list[Example]:
        budget = int(context.sizes.choice(budgets))
        sides = context.sizes.integers(1024, 2049, size=2)
        width, height = fit_to_tokens(int(sides[0]), int(sides[1]), budget)
        examples = []
        for _ in range(max(1, token_total // budget)):
            sample = render_scene(
                context.seed(),
                width_px=2 * width * TOKEN_PX,
                height_px=2 * height * TOKEN_PX,
                font_set=context.font_set,
                reword=not context.held_out,
            )
            view = cut_view(sample.image, None, (width, height))
            shown = context.some(list(sample.questions), 7)
            examples.append(build_example(f"places_{budget}", [view], sample.lines, shown, objects=sample.objects))
        return examples

    return build


def _pairs(pictures: int, per_picture: int, of_scenes: bool) -> Task:
    """Coarse view and region crop together."""

    def build(context: TaskContext) -> list[Example]:
        rng = context.rng
        coarse = int(context.sizes.choice([64, 64, 100, 144]))
        examples = []
        for _ in range(pictures):
            sample = context.scene() if of_scenes else context.document()
            width, height = sample.image.size
            tokens = fit_to_tokens(width, height, coarse)
            first = cut_view(sample.image, None, tokens)
            asked = [q for q in sample.questions if q.boxes and q.field not in _WHOLE_PAGE]
            for question in context.some(asked, per_picture):
                target = question.boxes[int(rng.integers(len(question.boxes)))]
                box = crop_around(target, (width, height), rng, width / tokens[0])
                shown = [q for q in asked if q is not question and inside(q, box)]
                shown = [question, *context.some(shown, 3)]
                second = cut_view(sample.image, box, region_tokens(box, rng))
                views = [first, second]
                examples.append(build_example("pair", views, sample.lines, shown, objects=_objects(sample)))
        return examples

    return build


def _plain(budgets: tuple[int, ...], token_total: int, of_scenes: bool) -> Task:
    """The plain look at one of the budgets; the batch is as many pictures as `token_total` visual tokens hold."""

    def build(context: TaskContext) -> list[Example]:
        budget = int(context.sizes.choice(budgets))
        examples = []
        for _ in range(max(1, token_total // budget)):
            sample = context.scene() if of_scenes else context.document()
            view = cut_view(sample.image, None, fit_to_tokens(*sample.image.size, budget))
            shown = context.some(list(sample.questions), 6)
            examples.append(build_example(f"plain_{budget}", [view], sample.lines, shown, objects=_objects(sample)))
        return examples

    return build


def _objects(sample: SyntheticSample) -> tuple[SceneObject, ...] | None:
    """The objects of a scene; None for a document, which teaches nothing about them."""
    return sample.objects if sample.kind == "scene" else None


def _receipts(kind: str, token_total: int) -> Task:
    """Real receipts, where the recipe names their folder."""

    def build(context: TaskContext) -> list[Example]:
        if context.receipts is None:
            raise ConfigError(
                "A stage mixes real receipts: set `receipts` in the recipe to the folder that holds them."
            )
        chosen = context.receipts.held_out if context.held_out else context.receipts.train
        budget = int(context.sizes.choice([64, 144, 144] if kind == "pair" else LADDER[:-1]))
        count = max(1, token_total // (2 * budget if kind == "pair" else 40 if kind == "snippet" else budget))
        return receipt_examples(chosen, context.rng, context.sizes, kind, count, budget)

    return build


def _glyphs(documents: int, crops: int, sheets: int) -> Task:
    """Densely printed views without questions: they train the vision tower alone, through the glyph guide."""

    def build(context: TaskContext) -> list[Example]:
        rng = context.rng
        tokens = [(6, 6), (8, 5), (5, 8), (10, 4)][int(context.sizes.integers(4))]
        examples = []
        for _ in range(documents):
            sample = context.document()
            printed = [line for line in sample.lines if line.text.strip("-=* ")]
            for _ in range(crops):
                boxes = printed[int(rng.integers(len(printed)))].char_boxes_px
                x0, y0 = boxes[:, :2].min(axis=0)
                x1, y1 = boxes[:, 2:].max(axis=0)
                text_px = float(np.exp(rng.uniform(np.log(9), np.log(28))))
                middle = int((x0 + x1) / 2)
                target = (max(0, middle - 20), max(0, int(y0)), middle + 20, int(y1) + 1)
                box = snippet_box(target, sample.image.size, text_px, tokens, rng)
                examples.append(build_example("glyphs", [cut_view(sample.image, box, tokens)], sample.lines, []))
        for _ in range(sheets):
            size = {"width_px": tokens[0] * TOKEN_PX, "height_px": tokens[1] * TOKEN_PX}
            sheet = render_strip(context.seed(), **size, max_lines=2 * tokens[1], font_set=context.font_set)
            examples.append(build_example("glyphs", [cut_view(sheet.image, None, tokens)], sheet.lines, []))
        return examples

    return build


TASKS: dict[str, Task] = {
    "glyphs": _glyphs(1, 9, 6),
    "cards": _cards(8),
    "places": _places((64, 100, 144), 800),
    "receipt_pair": _receipts("pair", 1024),
    "receipt_snippet": _receipts("snippet", 640),
    "receipt_plain": _receipts("plain", 1024),
    "tags": _strips([(2, 1), (3, 1)], 4, 1, 0.0),
    "line": _strips([(4, 1), (3, 1), (4, 2), (5, 2), (6, 2)], 32, 1, 0.0),
    "strip": _strips([(6, 2), (8, 2), (6, 3), (5, 3), (8, 3)], 16, 3, 0.6),
    "snippet": _snippets(2, 6),
    "pair": _pairs(2, 2, of_scenes=False),
    "scene_pair": _pairs(2, 2, of_scenes=True),
    "page": _plain(LADDER[:-1], 600, of_scenes=False),
    "page_1024": _plain(LADDER[-1:], 1024, of_scenes=False),
    "scene": _plain(LADDER[:-1], 600, of_scenes=True),
    "scene_1024": _plain(LADDER[-1:], 1024, of_scenes=True),
    **{f"page_{budget}": _plain((budget,), 1024, of_scenes=False) for budget in LADDER[:-1]},
    **{f"scene_{budget}": _plain((budget,), 1024, of_scenes=True) for budget in LADDER[:-1]},
}


def make_examples(
    task: str,
    rng: np.random.Generator,
    sizes: np.random.Generator | None = None,
    *,
    held_out: bool = False,
    receipts: ReceiptSet | None = None,
) -> list[Example]:
    """A batch of examples of a task; `sizes` decides the pictures' sizes (else `rng` does)."""
    context = TaskContext(rng, sizes if sizes is not None else rng, held_out=held_out, receipts=receipts)
    return TASKS[task](context)
