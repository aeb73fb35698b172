"""Pictures with questions for head training, in one form: synthetic documents and scenes, and real receipts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qzoom.data.questions import read_receipts
from qzoom.data.samples import EvalSample
from qzoom.images.load import LoadedImage, load_image
from qzoom.training.heads_recipe import HeadsRecipe
from qzoom.types import Box

__all__ = ["LabelPicture", "LabelQuestion", "label_pictures"]


@dataclass(frozen=True, slots=True)
class LabelQuestion:
    """A question with its reference answer and, where known, the boxes that hold it."""

    question: str
    answer: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class LabelPicture:
    """A picture and what is asked about it; `kind` is "document", "scene" or "receipt"."""

    kind: str
    name: str
    picture: LoadedImage
    questions: tuple[LabelQuestion, ...]


def label_pictures(
    recipe: HeadsRecipe, documents: int, scenes: int, receipts: int, *, salt: int, rank: int = 0, world: int = 1
) -> Iterator[LabelPicture]:
    """This rank's share of the pictures, kinds mixed, the same for the same seed.

    Args:
        recipe: seed, questions per picture and the receipts' folder.
        documents: how many over all ranks.
        scenes: likewise.
        receipts: likewise, at most as many as the train split has.
        salt: keeps the pictures of different steps apart.
        rank: this process.
        world: number of processes.
    """
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.records import TRAIN_SEEDS
    from qzoom.data.synthetic.scenes import render_scene

    rng = random.Random(f"{recipe.seed}/{salt}")
    real = _receipts(Path(recipe.receipts)) if recipe.receipts and receipts else []
    rng.shuffle(real)
    plan: list[tuple[str, int]] = [("document", rng.randrange(TRAIN_SEEDS.stop)) for _ in range(documents)]
    plan += [("scene", rng.randrange(TRAIN_SEEDS.stop)) for _ in range(scenes)]
    plan += [("receipt", i) for i in range(min(receipts, len(real)))]
    rng.shuffle(plan)
    for kind, number in plan[rank::world]:
        chooser = random.Random(f"{recipe.seed}/{salt}/{kind}/{number}")
        if kind == "receipt":
            picture = _receipt(real[number])
        else:
            sample = (render_document if kind == "document" else render_scene)(number)
            questions = tuple(LabelQuestion(q.question, q.answer, q.boxes) for q in sample.questions)
            loaded = load_image(sample.image)
            picture = LabelPicture(kind, f"{kind}:{number}", loaded, questions)
        chosen = chooser.sample(picture.questions, min(recipe.questions, len(picture.questions)))
        yield LabelPicture(picture.kind, picture.name, picture.picture, tuple(chosen))


def _receipts(folder: Path) -> list[EvalSample]:
    """The train split, pictures not yet read."""
    return list(read_receipts(folder, "train").samples)


def _receipt(sample: EvalSample) -> LabelPicture:
    questions = tuple(LabelQuestion(q.question, q.answer, q.boxes) for q in sample.questions)
    return LabelPicture("receipt", f"receipt:{sample.id}", load_image(sample.image), questions)
