"""One variant of the ablations: its labels, its small training, and its answers. Every step is stored on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ablation_labels import (
    changed_labels,
    draw_questions,
    from_boxes,
    known_answers,
    label_facts,
    relabelled,
    some_labels,
)
from benchmarks.ablation_variants import REFERENCE, Variant
from benchmarks.evidence import Clock
from qzoom.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from qzoom.labels.settings import RegionRecipe
    from qzoom.labels.workers import LabelRun
    from qzoom.store.schema import Question

LABEL_SEED = 1_700_000_000
SPACE = 10_000_000
"""Drawn pictures of the region labels begin at the first number, the gate's and stage 2's one and two spaces later."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """Where the ablations of one base lie, and how large they are.

    Args:
        root: folder of everything.
        base: folder of the plain base.
        given: the command line.
        clock: of this call.
        say: shows progress.
    """

    root: Path
    base: Path
    given: Namespace
    clock: Clock
    say: Callable[[str], None]

    def step(self, text: str) -> Callable[..., None]:
        """A callback that says what is done and ends the call in good time."""
        done = [0]

        def tell(*_: Any) -> None:
            done[0] += 1
            self.say(f"{text}: {done[0]}")
            self.clock.check()

        return tell


def plain_base(model: str, folder: Path) -> Path:
    """A copy of a model's base without its branches, to train new ones on.

    Raises:
        CheckpointError: the folder holds no base.
    """
    from qzoom.checkpoints.hub import find_source

    source = Path(find_source(model, None).folder)
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{model} does not hold its base; name a folder that does, or the base itself.")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("qzoom*", "*.jsonl", "README*"))
        os.replace(partial, folder)
    return folder


def questions_of(bench: Bench, name: str, pictures: int, offset: int) -> tuple[Question, ...]:
    """Drawn questions, as many documents as scenes."""
    from qzoom.data.questions import read_questions

    counts = {"documents": -(-pictures // 2), "scenes": pictures // 2}
    tell = bench.step(f"drawing pictures for {name}")
    path = draw_questions(bench.root / "pictures" / name, counts, 4, LABEL_SEED + offset * SPACE, tell)
    return tuple(read_questions(path)[0])


def region_recipe(bench: Bench) -> RegionRecipe:
    """How the own answers are labelled, as for the packaged heads."""
    from qzoom.labels.settings import HeadSearch, RegionRecipe

    return RegionRecipe(
        heads=bench.given.heads,
        tokens=bench.given.teacher_tokens,
        max_new_tokens=bench.given.label_tokens,
        search=HeadSearch(pictures=bench.given.probe_pictures),
    )


def own_labels(bench: Bench) -> Path:
    """Labels from the attention of the base's own answers; made once."""
    from qzoom.labels.label_regions import label_regions

    folder = bench.root / "labels" / "own"
    questions = questions_of(bench, "labels", bench.given.pictures, 0)
    run = label_run(bench.base, folder, bench.step("labelling pictures"))
    label_regions(run, questions, region_recipe(bench))
    return folder


def label_run(model: Path, folder: Path, tell: Callable[..., None]) -> LabelRun:
    """One labelling process for a model in a folder."""
    from qzoom.labels.workers import LabelRun, ModelSpec

    return LabelRun(ModelSpec(str(model)), folder, on_question=tell)


def labels_of(bench: Bench, name: str) -> Path:
    """Labels of a variant, made from the own ones at no cost where that is possible."""
    from qzoom.labels.settings import LabelMapSettings

    own, folder = own_labels(bench), bench.root / "labels" / name
    settings = region_recipe(bench).maps
    if name == "own":
        return own
    if name.startswith("two-state"):
        threshold = {"two-state-010": 0.10, "two-state-025": 0.25}[name]
        one = dataclasses.replace(settings, foreground=threshold, background=threshold)
        return changed_labels(own, folder, name, relabelled(one, two_state=True))
    if name == "sinks-kept":
        return changed_labels(own, folder, name, relabelled(LabelMapSettings(), sinks=False))
    if name == "known-boxes":
        return changed_labels(own, folder, name, from_boxes)
    if name in ("few", "some"):
        maps = max(1, label_facts(own)["usable"] // {"few": 16, "some": 4}[name])
        return some_labels(own, folder, maps)
    return _known_answers(bench, own, folder)


def _known_answers(bench: Bench, own: Path, folder: Path) -> Path:
    from qzoom.labels.find_heads import HeadSet
    from qzoom.labels.workers import ModelSpec

    kept = json.loads((own / "heads.json").read_text(encoding="utf-8"))["heads"]
    heads: Any = {mode: HeadSet(tuple((a, b) for a, b in value["pointing"])) for mode, value in kept.items()}
    questions = questions_of(bench, "labels", bench.given.pictures, 0)
    engine = ModelSpec(str(bench.base)).load()
    tell = bench.step("reading known answers")
    return known_answers(engine, region_recipe(bench), questions, own, folder, heads=heads, check=tell)


def train_regions(bench: Bench, variant: Variant) -> Path:
    """The variant's region branch; returns the adapter's folder. The reference's for variants that train none."""
    if not variant.trains:
        return bench.root / "variants" / REFERENCE / "train" / "model"
    changes = {"base": str(bench.base), "labels": [str(labels_of(bench, variant.labels))]} | _size(bench)
    return _train(bench, "regions", bench.root / "variants" / variant.name / "train", changes | (variant.recipe or {}))


def train_gate(bench: Bench, strategy: str) -> Path:
    """A gate beside the reference's region branch, from the ladder's labels by one of the two strategies."""
    from qzoom.labels.gate import label_gate
    from qzoom.labels.settings import GateRecipe

    folder = bench.root / "labels" / "ladder"
    questions = questions_of(bench, "ladder", bench.given.gate_pictures, 1)
    tell = bench.step("climbing the ladder")
    recipe = GateRecipe(tokens=tuple(bench.given.ladder), max_new_tokens=bench.given.label_tokens)
    label_gate(label_run(bench.base, folder, tell), questions, recipe)
    base = bench.root / "variants" / REFERENCE / "train" / "model"
    changes = {"base": str(base), "original": str(bench.base), "labels": [str(folder)], "strategy": strategy}
    steps = {"steps": bench.given.gate_steps, "batch": bench.given.batch, "micro_batch": min(16, bench.given.batch)}
    return _train(bench, "gate", bench.root / "variants" / f"gate-{strategy}" / "train", changes | steps)


def train_answers(bench: Bench) -> Path:
    """Stage 2 on the reference: mine with aligned positions, train the decoder; returns the merged model's folder."""
    from qzoom.labels.hard_cases import label_hard_cases
    from qzoom.labels.settings import HardCaseRecipe

    base = bench.root / "variants" / REFERENCE / "train" / "model"
    folder = bench.root / "labels" / "mined"
    coarse, region = bench.given.looks[-1]
    recipe = HardCaseRecipe(coarse, region, bench.given.label_tokens)
    questions = questions_of(bench, "mine", bench.given.mine_pictures, 2)
    label_hard_cases(label_run(base, folder, bench.step("mining")), questions, recipe)
    changes = {"base": str(base), "original": str(bench.base), "labels": [str(folder)], "region_tokens": region}
    steps = {"steps": bench.given.answer_steps, "batch": bench.given.batch, "micro_batch": min(8, bench.given.batch)}
    return _train(bench, "answers", bench.root / "variants" / "stage-2" / "train", changes | steps)


def _size(bench: Bench) -> dict[str, Any]:
    given = bench.given
    tokens = sorted({coarse for coarse, _ in given.looks})
    return {"steps": given.steps, "batch": given.batch, "micro_batch": min(16, given.batch), "tokens": tokens}


def _train(bench: Bench, stage: str, folder: Path, changes: dict[str, Any]) -> Path:
    """Run a stage with the shipped recipe and these changes; one that has a report is finished."""
    from qzoom.store.records import RecordStore
    from qzoom.training.stages import load_stage_recipe
    from qzoom.training.train_stage import train_stage

    recipe = load_stage_recipe(
        bench.given.recipes / f"{stage}.yaml", stage, changes | {"save_steps": 50, "trackers": ()}
    )
    samples = [len(RecordStore(Path(store)).samples) for store in recipe.labels]
    note, wanted = folder / "settings.json", recipe.decisive() | {"samples": samples}
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != wanted:
        raise ConfigError(
            f"{folder} holds a training with other settings or other labels; name another --runs, or remove the folder."
        )
    if not (note.is_file() and (folder / "report.json").is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        tell = bench.step(f"training {folder.parent.name}, step")
        train_stage(recipe, folder, device=bench.given.train_device, on_step=tell)
        note.write_text(json.dumps(wanted), encoding="utf-8")
    return folder / "model"
