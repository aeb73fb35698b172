"""From a base model to an adapter: rank heads, label, fit the region branch, climb the ladder, fit the gate.

Labelling is the slow part: it runs in several processes and keeps shards under the output folder, so that a rerun goes
on where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qzoom.config import OUR_BOX_RULE, TokenBudget, ZoomConfig
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.heads.branches import new_gate, new_region
from qzoom.labels.attention import cells_of_boxes, rank_heads
from qzoom.labels.gate import Trajectory, draw_label, select_items
from qzoom.training.heads_data import LabelPicture, label_pictures
from qzoom.training.heads_fit import fit_gate, fit_region
from qzoom.training.heads_label import answer_picture, known_box_labels, own_labels, response_maps, student_states
from qzoom.training.heads_recipe import HeadsRecipe
from qzoom.training.heads_store import BranchExample, in_shards, read_shard
from qzoom.training.heads_zoom import ZOOM_SHARDS, balanced

__all__ = ["HeadsReport", "agreement", "build_heads", "label_share", "probe_heads", "train_gate", "train_region"]

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class HeadsReport:
    """What head training found and reached.

    Args:
        heads: (layer, head) pairs whose attention made the labels.
        label_agreement: share of usable label maps, made from attention, with a foreground cell on a known answer box;
            None where no box is known.
        region_examples: label maps trained on.
        gate_examples: by target.
        region_losses: mean loss of each tenth of the run.
        gate_losses: likewise.
    """

    heads: Pairs
    label_agreement: float | None
    region_examples: int
    gate_examples: dict[str, int]
    region_losses: tuple[float, ...]
    gate_losses: tuple[float, ...]


def build_heads(engine: Engine, recipe: HeadsRecipe) -> Engine:
    """The base with fresh branches and our arithmetic: exact boxes around the peak's component."""
    torch.manual_seed(recipe.seed)
    top = max(recipe.student_tokens)
    config = ZoomConfig(
        shared_layers=recipe.shared_layers,
        branch_layers=recipe.branch_layers,
        gate_threshold=recipe.gate_threshold,
        region_threshold=recipe.region_threshold,
        sink="none",
        box=OUR_BOX_RULE,
        coarse_tokens=TokenBudget(min(64, top), top),
        region_tokens=TokenBudget(min(64, top), top),
    )
    gate = new_gate(engine.backbone, config.shared_layers, config.branch_layers)
    return Engine(
        engine.backbone, gate, new_region(engine.backbone, config.shared_layers, config.branch_layers), config
    )


def probe_heads(engine: Engine, recipe: HeadsRecipe) -> Pairs:
    """The heads that point best at known boxes of synthetic pictures (method.md 5.1 picks them by hand)."""
    if recipe.heads:
        return recipe.heads
    chat = ChatEncoder(engine.backbone)
    samples = []
    half = recipe.probe_pictures // 2
    for item in label_pictures(recipe, recipe.probe_pictures - half, half, 0, salt=1):
        answered = answer_picture(engine, chat, item, recipe.teacher_tokens)
        for i, question in enumerate(item.questions):
            found = response_maps(engine, answered, i, range(engine.backbone.num_layers))
            if found is not None and question.boxes:
                grid = answered.states[i].prompt.spans[0].features.grid
                samples.append((found, cells_of_boxes(question.boxes, item.picture.size_px, grid)))
    ranked = rank_heads(samples)
    return tuple((s.layer, s.head) for s in ranked[: recipe.head_count])


def label_share(
    engine: Engine,
    recipe: HeadsRecipe,
    heads: Pairs,
    output: Path,
    rank: int,
    world: int,
    on_picture: Callable[[], None],
) -> None:
    """Label this rank's pictures, region maps first, then ladders; shards that exist are skipped.

    Args:
        engine: the base.
        recipe: what to label.
        heads: whose attention.
        output: folder of the shards.
        rank: this process.
        world: number of processes.
        on_picture: called after each picture.
    """
    chat = ChatEncoder(engine.backbone)
    region = label_pictures(
        recipe, recipe.documents, recipe.scenes, recipe.receipt_pictures, salt=2, rank=rank, world=world
    )
    in_shards(
        region,
        output,
        f"region-{world}-{rank}",
        lambda item: _region_examples(engine, chat, recipe, heads, item),
        on_picture,
    )
    if recipe.gate_labels == "zoom":
        return
    third = recipe.gate_pictures // 3
    real = min(third, recipe.receipt_pictures) if recipe.receipts else 0
    ladder = label_pictures(recipe, recipe.gate_pictures - third - real, third, real, salt=3, rank=rank, world=world)
    in_shards(
        ladder, output, f"gate-{world}-{rank}", lambda item: _gate_examples(engine, chat, recipe, item), on_picture
    )


def _region_examples(
    engine: Engine, chat: ChatEncoder, recipe: HeadsRecipe, heads: Pairs, item: LabelPicture
) -> list[BranchExample]:
    rng = random.Random(item.name)
    states = student_states(engine, chat, item, rng.choice(recipe.student_tokens))
    known = item.kind in recipe.known_boxes
    answered = None if known else answer_picture(engine, chat, item, recipe.teacher_tokens)
    out = []
    for i, question in enumerate(item.questions):
        if answered is None:
            grid = states[i].prompt.spans[0].features.grid
            labels, text = known_box_labels(item, i, grid), ""
        else:
            grid, text = answered.states[i].prompt.spans[0].features.grid, answered.texts[i]
            labels = own_labels(engine, answered, i, heads, recipe)
        if labels is None or not bool((labels >= 0).any()):
            continue
        facts: dict[str, Any] = {"kind": item.kind, "answer": text, "reference": question.answer}
        if question.boxes and not known:
            inside = cells_of_boxes(question.boxes, item.picture.size_px, grid)
            facts["agrees"] = bool((inside & (labels == 1)).any())
        out.append(BranchExample.of(states[i], labels, facts))
    return out


def _gate_examples(engine: Engine, chat: ChatEncoder, recipe: HeadsRecipe, item: LabelPicture) -> list[BranchExample]:
    """Every rung answered once; the label is drawn when the shards are read, since easy ones are drawn 1:1."""
    climbed = [answer_picture(engine, chat, item, tokens) for tokens in recipe.ladder]
    out = []
    for i, question in enumerate(item.questions):
        answers = [rung.texts[i] for rung in climbed]
        trajectory = Trajectory(recipe.ladder, tuple(answers), question.answer)
        label, tokens = draw_label(trajectory, random.Random(f"{item.name}/{i}"))
        state = climbed[recipe.ladder.index(tokens)].states[i]
        facts = {"kind": item.kind, "answers": answers, "reference": question.answer, "tokens": tokens}
        out.append(BranchExample.of(state, torch.tensor(label), facts))
    return out


def agreement(examples: Sequence[BranchExample]) -> float | None:
    """Share of label maps with a foreground cell on a known answer box."""
    known = [bool(e.facts["agrees"]) for e in examples if "agrees" in e.facts]
    return sum(known) / len(known) if known else None


def train_region(
    engine: Engine, recipe: HeadsRecipe, output: Path, on_step: Callable[[str, int, float], None]
) -> tuple[list[BranchExample], tuple[float, ...]]:
    """Fit the region branch on the labelled shards of a folder.

    Args:
        engine: base with fresh branches (`build_heads`); trained in place.
        recipe: steps and rates.
        output: folder of the shards.
        on_step: called with the branch, the step and its loss.

    Returns:
        What was trained on, and the mean loss of each tenth of the run.

    Raises:
        DataError: no usable labels.
    """
    region = [e for path in sorted(output.glob("region-*.safetensors")) for e in read_shard(path)]
    if not region:
        raise DataError(
            f"No region labels under {output}: none of the answers gave a usable map; check the base model."
        )
    fit = fit_region(
        engine,
        region,
        steps=recipe.steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        on_step=lambda step, loss: on_step("region", step, loss),
    )
    return region, fit.losses


def train_gate(
    engine: Engine, recipe: HeadsRecipe, output: Path, on_step: Callable[[str, int, float], None]
) -> tuple[dict[str, int], tuple[float, ...]]:
    """Fit the gate on the shards of a folder; arguments as in `train_region`.

    Returns:
        Examples by target, and the mean loss of each tenth of the run; none without examples.
    """
    if recipe.gate_labels == "zoom":
        compared = [e for path in sorted(output.glob(f"{ZOOM_SHARDS}-*.safetensors")) for e in read_shard(path)]
        chosen = balanced(compared, recipe.seed)
    else:
        climbed = [e for path in sorted(output.glob("gate-*.safetensors")) for e in read_shard(path)]
        chosen = _gate_selection(climbed, recipe)
    losses: tuple[float, ...] = ()
    if chosen:
        losses = fit_gate(
            engine,
            chosen,
            steps=recipe.gate_steps,
            batch=recipe.batch,
            learning_rate=recipe.learning_rate / 2,
            seed=recipe.seed,
            on_step=lambda step, loss: on_step("gate", step, loss),
        ).losses
    return {str(t): sum(int(e.labels) == t for e in chosen) for t in (0, 1)}, losses


def _gate_selection(climbed: Sequence[BranchExample], recipe: HeadsRecipe) -> list[BranchExample]:
    """Transitions, and as many easy questions (method.md 8.5); samples whose draw says "ignore" are left out."""
    trajectories = [Trajectory(recipe.ladder, tuple(e.facts["answers"]), e.facts["reference"]) for e in climbed]
    return [climbed[i] for i in select_items(trajectories, recipe.seed) if int(climbed[i].labels) >= 0]
