"""One part of a run, supervised or reinforced: order, trainer, resume, the best weights at its end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.engine.state import Engine
from qzoom.training.distill.data import Split
from qzoom.training.distill.follow import Follower, FollowSettings, last_checkpoint
from qzoom.training.distill.order import Row, make_order
from qzoom.training.distill.prompts import Prompter
from qzoom.training.distill.recipe import DistillRecipe, JudgePart
from qzoom.training.distill.replay import draw_replay
from qzoom.training.distill.rewards import JudgeCall
from qzoom.training.distill.settings import Place
from qzoom.training.distill.validate import Best, Validation, Validator
from qzoom.training.stages.metrics import StepFacts

if TYPE_CHECKING:
    from torch import nn

__all__ = ["run_part"]

FINAL = "final.safetensors"


def run_part(
    part: str,
    engine: Engine,
    model: Any,
    weights: dict[str, nn.Parameter],
    split: Split,
    recipe: DistillRecipe,
    folder: Path,
    steps: int,
    device: str,
    on_step: Callable[[StepFacts], None],
    on_validation: Callable[[Validation], None],
) -> tuple[list[float], list[Validation], int | None]:
    """Train a part, or go on with it; a finished one is only loaded.

    Args:
        part: "sft" or "grpo".
        engine: the student, validated as it trains.
        model: for the trainer.
        weights: those that train, by name.
        split: the data.
        recipe: how.
        folder: of this part.
        steps: optimiser steps.
        device: "cpu" or "cuda".
        on_step: called with each step's facts.
        on_validation: called with each validation.

    Returns:
        Losses and validations of this process, and the step of the weights that were kept (None without validation).
    """
    folder.mkdir(parents=True, exist_ok=True)
    best = Best(folder, weights, part, last=recipe.keep == "last")
    if (folder / FINAL).is_file():
        return [], [], _load_final(folder / FINAL, weights)
    settings: Any = getattr(recipe, part)
    rows = make_order(
        split.train,
        steps=steps,
        batch=settings.batch,
        most=recipe.sft.questions if part == "sft" else 1,
        tokens=recipe.tokens,
        negatives=recipe.negatives,
        replay=recipe.replay,
        seed=recipe.seed if part == "sft" else recipe.seed + 1,
        windows=recipe.windows if part == "sft" else None,
    )
    told = FollowSettings(steps, settings.batch, recipe.validation_steps, recipe.tensorboard)
    follower = Follower(folder, told, Validator(engine, split.validation, recipe), best, on_step, on_validation)
    prompter = Prompter(engine, recipe)
    with _judge(recipe.grpo.judge, folder.parent / "judge.jsonl") as judge, _stock_forward(engine), _no_advice():
        make = _sft if part == "sft" else partial(_grpo, judge=judge)
        place = Place(folder, device, int(os.environ.get("WORLD_SIZE", "1")))
        trainer = make(model, prompter, split, rows, steps, recipe, place, follower)
        last = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    kept = best.restore()
    if not int(os.environ.get("RANK", "0")):
        _save_final(folder / FINAL, weights, kept)
    return follower.losses, follower.validations, kept


def _sft(
    model: Any,
    prompter: Prompter,
    split: Split,
    rows: list[Row],
    steps: int,
    recipe: DistillRecipe,
    place: Place,
    follower: Follower,
) -> Any:
    from qzoom.training.distill.collate import Collator
    from qzoom.training.distill.sft import fits_plain, make_sft_trainer

    drawn = partial(draw_replay, most=max(2, recipe.sft.questions))
    masked, regions = fits_plain(model, recipe, place), recipe.pointing.weight > 0
    collator = Collator(prompter, split.train, rows, drawn, masked=masked, regions=regions)
    tokenizer = prompter.engine.backbone.tokenizer
    return make_sft_trainer(model, tokenizer, collator, len(rows), steps, recipe, place, [follower])


def _grpo(
    model: Any,
    prompter: Prompter,
    split: Split,
    rows: list[Row],
    steps: int,
    recipe: DistillRecipe,
    place: Place,
    follower: Follower,
    judge: JudgeCall | None = None,
) -> Any:
    from qzoom.training.distill.grpo import RowReader, make_grpo_trainer

    drawn = lru_cache(maxsize=2 * recipe.grpo.batch)(partial(draw_replay, most=1))
    reader = RowReader(prompter, split.train, rows, drawn)
    return make_grpo_trainer(model, reader, len(rows), steps, recipe, place, judge, [follower])


@contextmanager
def _judge(part: JudgePart, cache: Path) -> Iterator[JudgeCall | None]:
    """The recipe's judge for as long as a part runs."""
    if not part.url:
        yield None
        return
    from qzoom.labels.judge import Judge, JudgeSettings

    settings = JudgeSettings(part.url, part.model, part.key_env, part.timeout_s, budget=part.budget)
    judge = Judge(settings, cache)
    try:
        yield judge.right
    finally:
        judge.close()


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without the libraries' announcements of names that they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _stock_forward(engine: Engine) -> Iterator[None]:
    """Trainers put their own forward on the model; afterwards it is the class's again."""
    model = engine.backbone.model
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


def _save_final(path: Path, weights: dict[str, nn.Parameter], kept: int | None) -> None:
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    tensors = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
    save_file(tensors, part, metadata={"step": "" if kept is None else str(kept)})
    part.replace(path)


def _load_final(path: Path, weights: dict[str, nn.Parameter]) -> int | None:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file, torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(file.get_tensor(name))
        step = (file.metadata() or {}).get("step", "")
    return int(step) if step else None
