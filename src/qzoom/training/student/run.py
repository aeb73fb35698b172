"""One part of a run, supervised or reinforced: order, trainer, resume, the best weights at its end.

One distillation run from its recipe to a model folder: load, read data, train part by part, keep the best, save.

OUT/run.json       what decides the run, so that it is never gone on with other settings
OUT/pictures/      the data's pictures, each once
OUT/sft, OUT/grpo  checkpoints, metrics.jsonl, log.jsonl, the best and the final weights of a part
OUT/model          the result, heads included
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.training.loop import StepFacts, check_same_run
from qzoom.training.student.collate import Prompter
from qzoom.training.student.data import Split, digest_of, read_split
from qzoom.training.student.recipe import DistillRecipe, JudgePart, Place
from qzoom.training.student.rewards import JudgeCall
from qzoom.training.student.schedule import Row, count_rows, draw_replay, make_order
from qzoom.training.student.validate import Best, Follower, FollowSettings, Validation, Validator, last_checkpoint

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DistillReport",
    "PartReport",
    "load_student",
    "parts_of",
    "prepare_student",
    "run_part",
    "steps_of_part",
    "train_distill",
]


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
    with _judge(recipe.grpo.judge, folder.parent / "calls.sqlite") as judge, _stock_forward(engine), _no_advice():
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
    from qzoom.training.student.collate import Collator
    from qzoom.training.student.sft import fits_plain, make_sft_trainer

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
    from qzoom.training.student.grpo import RowReader, make_grpo_trainer

    drawn = lru_cache(maxsize=2 * recipe.grpo.batch)(partial(draw_replay, most=1))
    reader = RowReader(prompter, split.train, rows, drawn)
    return make_grpo_trainer(model, reader, len(rows), steps, recipe, place, judge, [follower])


@contextmanager
def _judge(part: JudgePart, cache: Path) -> Iterator[JudgeCall | None]:
    """The recipe's judge for as long as a part runs."""
    if not part.url:
        yield None
        return
    from qzoom.llm.settings import CallSettings, EndpointSettings
    from qzoom.scoring.judge import open_judge

    endpoint = EndpointSettings(part.url, part.model, part.key_env, part.timeout_s)
    judge = open_judge(endpoint, CallSettings(retries=5, budget_requests=part.budget), cache)
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


RUN = "run.json"
HEADS_NOTE = (
    "Gate and region branch were fitted on the model before this training and are carried over unchanged. Fit them "
    "again: qzoom label regions, qzoom train regions --refit, qzoom label gate, qzoom train gate; see docs/training.md."
)


@dataclass(frozen=True, slots=True)
class PartReport:
    """What one part came to.

    Args:
        part: "sft" or "grpo".
        steps: optimiser steps.
        first_loss: mean of the first tenth of this process's steps; None when there was nothing left to do.
        last_loss: mean of the last tenth.
        best_step: of the weights that were kept; None without validation.
        seconds: of this process's steps.
    """

    part: str
    steps: int
    first_loss: float | None
    last_loss: float | None
    best_step: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a run came to.

    Args:
        model: folder of the result.
        questions: trained on.
        negatives: of them, whose target is absent.
        held_out: questions kept for validation.
        trained: number of weights that trained.
        parts: in order.
        validations: of this process, in order.
    """

    model: str
    questions: int
    negatives: int
    held_out: int
    trained: int
    parts: tuple[PartReport, ...]
    validations: tuple[Validation, ...]


def parts_of(recipe: DistillRecipe) -> tuple[str, ...]:
    """The parts of a method, in order."""
    return tuple(recipe.method.split("+"))


def steps_of_part(recipe: DistillRecipe, part: str, split: Split) -> int:
    """Optimiser steps of a part."""
    settings: Any = getattr(recipe, part)
    if settings.steps:
        return int(settings.steps)
    rows = count_rows(split.train, _questions_a_row(recipe, part), recipe.negatives, recipe.seed)
    return max(1, round(settings.epochs * rows / (1.0 - recipe.replay) / settings.batch))


def prepare_student(engine: Engine, recipe: DistillRecipe) -> tuple[Any, dict[str, nn.Parameter]]:
    """Choose what trains; with LoRA, put the matrices in.

    Args:
        engine: its backbone is changed in place; gate and region branch stay as they are.
        recipe: what trains.

    Returns:
        The model for the trainer, and the weights that train by name, in float32.

    Raises:
        ConfigError: peft is missing.
    """
    model: Any = engine.backbone.model
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.requires_grad_(False)
    model.requires_grad_(recipe.lora_rank == 0)
    if recipe.lora_rank:
        model = _with_lora(model, recipe)
    elif not recipe.vision:
        model.model.visual.requires_grad_(False)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        weight.data = weight.data.float()
    return model, weights


def train_distill(
    recipe: DistillRecipe,
    output: Path,
    *,
    device: str = "cpu",
    fresh: bool = False,
    base: Engine | None = None,
    on_part: Callable[[str, int], None] = lambda part, steps: None,
    on_step: Callable[[StepFacts], None] = lambda _: None,
    on_validation: Callable[[Validation], None] = lambda _: None,
) -> DistillReport:
    """Run a recipe; the same command goes on where it was stopped.

    Args:
        recipe: what to do.
        output: see the module.
        device: "cpu" or "cuda".
        fresh: start over.
        base: the loaded student, instead of loading the recipe's.
        on_part: called with each part's name and steps.
        on_step: called with each step's facts.
        on_validation: called with each validation.

    Raises:
        ConfigError: settings that do not fit an earlier run in `output`, or a missing package.
        DataError: data that cannot be used.
    """
    from qzoom.labels.label_regions import base_digest

    _need_trl()
    first = not int(os.environ.get("RANK", "0"))
    if first:
        _make_folder(output, fresh)
    _meet(device)
    if not recipe.data:
        raise DataError("The recipe names no data; give the folder that `qzoom distill` exported to with --data.")
    split = read_split(Path(recipe.data).expanduser(), output / "pictures", recipe.validation, recipe.seed)
    engine = base or load_student(recipe, device)
    digest = base_digest(engine)
    if first:
        _check_run(output, recipe, digest, split)
    model, weights = prepare_student(engine, recipe)
    reports: list[PartReport] = []
    validations: list[Validation] = []
    for part in parts_of(recipe):
        steps = steps_of_part(recipe, part, split)
        on_part(part, steps)
        began = time.monotonic()
        losses, found, best = run_part(
            part, engine, model, weights, split, recipe, output / part, steps, device, on_step, on_validation
        )
        validations += found
        reports.append(PartReport(part, steps, *_ends(losses), best, time.monotonic() - began))
    report = _report(output, split, weights, reports, validations)
    if first:
        if recipe.lora_rank:
            model.merge_and_unload()
        _save(engine, recipe, report, output, digest)
    return report


def _report(
    output: Path,
    split: Split,
    weights: dict[str, nn.Parameter],
    parts: list[PartReport],
    validations: list[Validation],
) -> DistillReport:
    negatives = sum(q.negative for q in split.train)
    trained = sum(weight.numel() for weight in weights.values())
    model, held_out = str(output / "model"), len(split.validation)
    return DistillReport(model, len(split.train), negatives, held_out, trained, tuple(parts), tuple(validations))


def load_student(recipe: DistillRecipe, device: str) -> Engine:
    """The recipe's base on a device; what does not train with LoRA is held in the recipe's precision.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    from qzoom.checkpoints.load import load_engine

    dtype = "bfloat16" if recipe.lora_rank and recipe.precision == "bfloat16" else "float32"
    place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    return load_engine(recipe.base, dtype=dtype, device_map=place)


def _with_lora(model: Any, recipe: DistillRecipe) -> Any:
    """LoRA beside all linear maps of the decoder, and of the vision tower where it trains."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("lora_rank needs the package peft; install it with: pip install 'qzoom[train]'.") from error
    maps = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    if recipe.vision:
        maps = rf"({maps})|(.*visual\..*\.(qkv|proj|linear_fc1|linear_fc2|gate_proj|up_proj|down_proj))"
    maps = rf"({maps})(?<!patch_embed\.proj)"
    settings = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, lora_dropout=0.0, target_modules=maps)
    return get_peft_model(model, settings)


def _questions_a_row(recipe: DistillRecipe, part: str) -> int:
    return recipe.sft.questions if part == "sft" else 1


def _need_trl() -> None:
    try:
        import datasets
        import trl
    except ImportError as error:
        raise ConfigError(
            f"`qzoom train distill` needs the package {error.name}; install it with: "
            "pip install 'qzoom[distill,train]'."
        ) from error
    del datasets, trl


def _make_folder(output: Path, fresh: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in ("sft", "grpo"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in (RUN, "report.json"):
            (output / name).unlink(missing_ok=True)


def _meet(device: str) -> None:
    """Wait until all processes of a run have come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu").wait_for_everyone()


def _check_run(output: Path, recipe: DistillRecipe, weights: str, split: Split) -> None:
    """Go on with the same run only; a new one is written down.

    Raises:
        ConfigError: the folder holds a run with other settings, base or data.
    """
    here = recipe.decisive() | {
        "weights": weights,
        "train": digest_of(split.train),
        "held_out": digest_of(split.validation),
    }
    here.pop("data")
    path = output / RUN
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged; start over with --fresh.") from error
        check_same_run(there, here, output)
        return
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(here, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def _save(engine: Engine, recipe: DistillRecipe, report: DistillReport, output: Path, digest: str) -> None:
    """The whole model with its heads, and what it was made from."""
    import torch

    from qzoom.checkpoints.adapter import save_pretrained

    figures = {name: value for name, value in asdict(report).items() if name != "model"}
    facts: dict[str, Any] = {"recipe": recipe.decisive(), "report": figures, "base_weights": digest}
    if engine.gate is not None or engine.region is not None:
        facts["heads"] = HEADS_NOTE
    facts["recipe"].pop("data")
    provenance = engine.config.provenance | {"distill": json.loads(json.dumps(facts))}
    stored = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    for part in (engine.backbone.model, engine.gate, engine.region):
        if part is not None:
            part.to(stored).requires_grad_(False)
    engine.backbone.model.eval()
    out = dataclasses.replace(engine, config=engine.config.replace(provenance=provenance))
    save_pretrained(out, output / "model", include_base=True)
    (output / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def _ends(losses: list[float]) -> tuple[float | None, float | None]:
    """Means of the first and of the last tenth; None without steps."""
    tenth = max(1, len(losses) // 10)
    return (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth) if losses else (None, None)
