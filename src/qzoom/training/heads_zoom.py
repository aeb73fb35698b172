"""Gate labels from what zooming does: the coarse answer and the zoomed one, each against the known answer.

The published ladder (method.md 8) asks whether more resolution of the whole picture helps. A small model can rarely
read fine print at any rung, so hardly any transition is left; whether the region helps is what the gate decides, and
it can be asked directly once the region branch is trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qzoom.config import TokenBudget
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.model import QZoom
from qzoom.scoring.metrics import exact_match
from qzoom.training.heads_data import LabelPicture, label_pictures
from qzoom.training.heads_label import ANSWER_TOKENS, student_states
from qzoom.training.heads_recipe import HeadsRecipe
from qzoom.training.heads_store import BranchExample, in_shards

__all__ = ["ZOOM_SHARDS", "balanced", "label_zoom_share", "zoom_label"]

ZOOM_SHARDS = "zoomgate"


def label_zoom_share(
    engine: Engine, recipe: HeadsRecipe, output: Path, rank: int, world: int, on_picture: Callable[[], None]
) -> None:
    """Label this rank's drawn pictures; shards that exist are skipped.

    Real receipts are left out: the base has seen the train split so often that its coarse answers there come from
    memory and say nothing about new ones.

    Args:
        engine: with a trained region branch.
        recipe: how many pictures.
        output: folder of the shards.
        rank: this process.
        world: number of processes.
        on_picture: called after each picture.
    """
    chat = ChatEncoder(engine.backbone)
    scenes = recipe.zoom_pictures // 3
    pictures = label_pictures(recipe, recipe.zoom_pictures - scenes, scenes, 0, salt=5, rank=rank, world=world)
    stem = f"{ZOOM_SHARDS}-{world}-{rank}"
    in_shards(pictures, output, stem, lambda item: _examples(engine, chat, recipe, item), on_picture)


def _examples(engine: Engine, chat: ChatEncoder, recipe: HeadsRecipe, item: LabelPicture) -> list[BranchExample]:
    tokens = random.Random(item.name).choice(recipe.student_tokens)
    states = student_states(engine, chat, item, tokens)
    session = QZoom(engine).session(item.picture, coarse_tokens=TokenBudget(1, tokens))
    out = []
    for state, question in zip(states, item.questions, strict=True):
        coarse, zoomed = (
            session.ask(question.question, zoom=zoom, max_new_tokens=ANSWER_TOKENS).text for zoom in ("never", "always")
        )
        label = zoom_label(coarse, zoomed, question.answer)
        facts = {"kind": item.kind, "coarse": coarse, "zoomed": zoomed, "reference": question.answer}
        if label is not None:
            out.append(BranchExample.of(state, torch.tensor(label), facts))
    return out


def zoom_label(coarse: str, zoomed: str, reference: str) -> int | None:
    """0 where the coarse answer is right, 1 where only the zoomed one is, None where neither is."""
    for label, answer in ((0, coarse), (1, zoomed)):
        if exact_match(answer, reference):
            return label
    return None


def balanced(examples: Sequence[BranchExample], seed: int) -> list[BranchExample]:
    """All examples of the rarer target and as many of the other, drawn at random."""
    groups = [[e for e in examples if int(e.labels) == target] for target in (0, 1)]
    count = min(len(group) for group in groups)
    rng = random.Random(seed)
    return [example for group in groups for example in rng.sample(group, count)]
