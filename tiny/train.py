"""Make the embedded model: pack pictures, train, measure. Run it from the repository's root.

    python tiny/train.py pack --recipe recipes/tiny/reader.yaml
    python tiny/train.py train --recipe recipes/tiny/reader.yaml --output runs/tiny
    python tiny/train.py measure --recipe recipes/tiny/reader.yaml --output runs/tiny
    python tiny/train.py propose --recipe recipes/tiny/reader.yaml --model tiny --output runs/tiny-proposals
    python tiny/train.py average runs/a/model runs/b/model --output runs/mean

Every command can be stopped at any time (also by kill -9) and is resumed by the same command. `train` writes
`state.safetensors` (to resume from), `training_curve.jsonl` (loss and held-out exact match) and the exported `model`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import typer

from qzoom.errors import ConfigError, QZoomError
from qzoom.model import QZoom
from tiny.aux_losses import GuidedModel, Targets, count_targets
from tiny.batch import Batch, Example, collate, split_pool
from tiny.checkpoint import MasterWeights, load_state, save_state
from tiny.curriculum import Context, examples_of, packs_needed
from tiny.draw_pages import draw_page, pack_header
from tiny.measure import measure
from tiny.model import average_models, build_tiny, export_model, load_weights, use_fast_kernels
from tiny.pack import Pack, build_pack
from tiny.processes import Processes
from tiny.proposals import PROPOSED_PACKS, propose, read_proposals
from tiny.receipt_data import ReceiptFolder
from tiny.recipe import Recipe, load_recipe
from tiny.run_folder import (
    CURVE_FILE,
    MODEL_FOLDER,
    STATE_FILE,
    append_to_curve,
    check_same_settings,
    curve_entries,
    cut_curve,
    require_state,
    run_settings,
    training_in,
)
from tiny.tokenizer import build_tokenizer, vocabulary_sentences

_RECEIPT_SPLITS = ("train", "held_out", "dev")

app = typer.Typer(help="Make the embedded model.", no_args_is_help=True, pretty_exceptions_enable=False)


def make_packs(recipe: Recipe) -> None:
    """Draw (or finish) every pack that the recipe's exercises read."""
    folder, needed = Path(recipe.packs), packs_needed(recipe.exercises)
    real = {f"receipts_{split}": _receipts(recipe, split) for split in _RECEIPT_SPLITS if "receipts" in needed}
    for name, receipts in real.items():  # a folder that is missing is said before anything is drawn
        build_pack(folder / name, receipts.header, receipts.page, _progress(name))
    for source in sorted(set(needed) - {"receipts"}):
        counts = recipe.pack_counts
        for kind, count in ((source, getattr(counts, source)), (f"{source}_held_out", counts.held_out)):
            name = kind if kind.endswith("_held_out") else f"{kind}_train"
            draw = partial(draw_page, kind, counts.seed)
            build_pack(folder / name, pack_header(kind, counts.seed, count), draw, _progress(name))


def _receipts(recipe: Recipe, split: str) -> ReceiptFolder:
    folder = recipe.receipts or os.environ.get("QZOOM_RECEIPTS")
    if not folder:
        raise ConfigError(
            "The mix holds real receipts: set `receipts` in the recipe, or the variable QZOOM_RECEIPTS, to the folder "
            "that holds them."
        )
    return ReceiptFolder(Path(folder), split)


def _progress(name: str) -> Any:
    started = time.process_time()

    def report(done: int) -> None:
        if done % 100 == 0:
            spent = time.process_time() - started
            print(json.dumps({"pack": name, "pages": done, "pages_per_cpu_second": round(done / spent, 1)}), flush=True)

    return report


def open_packs(recipe: Recipe) -> dict[str, Pack]:
    """All packs of the recipe, checked."""
    folder, packs = Path(recipe.packs), {}
    counts = recipe.pack_counts
    for source in sorted(packs_needed(recipe.exercises)):
        if source == "receipts":
            for split in _RECEIPT_SPLITS:
                name = f"receipts_{split}"
                packs[name] = Pack(folder / name, _receipts(recipe, split).header)
            continue
        packs[f"{source}_train"] = Pack(
            folder / f"{source}_train", pack_header(source, counts.seed, getattr(counts, source))
        )
        held_out = f"{source}_held_out"
        packs[held_out] = Pack(folder / held_out, pack_header(held_out, counts.seed, counts.held_out))
    return packs


class Run:
    """A training run in a folder, as its newest state has it; with `loop` it goes on.

    Args:
        recipe: what to train.
        output: folder for state, curve and model.
        device: "cpu" or "cuda".
    """

    def __init__(self, recipe: Recipe, output: Path, device: str = "cpu") -> None:
        self.recipe, self.output, self.device = recipe, output, torch.device(device)
        self.processes = Processes()
        self.tokenizer = build_tokenizer(vocabulary_sentences(), recipe.vocabulary_size)
        self.packs = open_packs(recipe)
        self.proposals = {} if recipe.proposals is None else read_proposals(Path(recipe.proposals), self.packs)
        model = build_tiny(recipe.architecture, self.tokenizer, recipe.seed)
        if recipe.start_from is not None:
            load_weights(model, Path(recipe.start_from))
        use_fast_kernels(model)
        torch.manual_seed(recipe.seed)
        self.guided = GuidedModel(model, recipe.guide_weights).to(self.device)
        self.masters = MasterWeights(self.guided, (recipe.muon_lr, recipe.adamw_lr), recipe.weight_decay)
        if recipe.bf16:
            self.guided.to(torch.bfloat16)
        self.counters: dict[str, Any] = {"step": 0, "samples": 0, "minutes": 0.0}
        counters, self._settings_there = load_state(output / STATE_FILE, self.masters)
        self.counters.update(counters)
        self._settings = run_settings(recipe, self.packs)
        self._saved_step = self.counters["step"] if counters else None
        self._costs: dict[str, float] = {}
        self._window: dict[str, list[float]] = defaultdict(list)

    @property
    def minutes(self) -> float:
        """Minutes trained so far."""
        return float(self.counters["minutes"])

    def loop(self) -> bool:
        """All remaining minutes, with checkpoints, figures and exports along the way; a termination signal ends it
        after the step in progress, with its state saved, and returns False. Where something is written, the state is
        written first. The caller holds the folder (`training_in`).

        Raises:
            ConfigError: the state comes from other settings.
            CheckpointError: the disk refuses.
        """
        recipe = self.recipe
        self._begin()
        stopping: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
        clock = time.process_time if self.device.type == "cpu" else time.monotonic
        mark = clock()
        saved = exported = measured = self.minutes
        while self.minutes < recipe.minutes:
            self._train_step()
            self.counters["step"] += 1
            seconds, stop = self.processes.total(clock() - mark, len(stopping))
            self.counters["minutes"] += seconds / 60
            export_due = self.minutes - exported > recipe.export_minutes
            measure_due = self.minutes - measured > recipe.evaluate_minutes
            if stop or export_due or measure_due or self.minutes - saved > recipe.checkpoint_minutes:
                self._save()
                saved = self.minutes
            if self.counters["step"] % 20 == 0:
                self._say()
            if stop:
                return False
            if export_due:
                self.export(self.output / MODEL_FOLDER)
                exported = self.minutes
            if measure_due:
                self.evaluate()
                measured = self.minutes
            mark = clock()
        self._save()
        self.export(self.output / MODEL_FOLDER)
        if not self._is_measured():
            self.evaluate()
        return True

    def _begin(self) -> None:
        """Check that the state is of this run, and save one if there is none: a run that is killed early goes on too,
        and a disk without space is said before anything is trained."""
        check_same_settings(self._settings_there, self._settings, self.output)
        if self.processes.first:
            cut_curve(self.output / CURVE_FILE, self.counters["step"])
        self._save()

    def _is_measured(self) -> bool:
        last = curve_entries(self.output / CURVE_FILE)[-1:]
        return bool(last) and "held_out" in last[0] and last[0]["step"] == self.counters["step"]

    def _train_step(self) -> None:
        recipe = self.recipe
        step = self.counters["step"]
        stage, factor = recipe.at(self.minutes)
        factor *= min(1.0, (step + 1) / recipe.warmup_steps)
        self.guided.shield_tower = recipe.start_from is not None and step < recipe.guide_steps
        started = time.process_time()
        groups = split_pool(self.draw(step), self.tokenizer, recipe.batch_positions)
        batches = [self._batch(group) for group in groups]
        drawn = time.process_time() - started
        totals = sum((count_targets(batch) for batch in batches), Targets())
        parts: dict[str, float] = defaultdict(float)
        for batch in self.processes.share(batches, (sum(e.tokens for e in group) for group in groups)):
            result = self.guided(batch.to(self.device), totals)
            result.loss.backward()
            self.masters.collect()
            for name, value in result.parts.items():
                parts[name] += value
            self._count_exact(batch, result.exact, result.lines_exact)
        self.processes.add_gradients(self.masters.weights.values())
        parts["norm"] = self.masters.step(factor, stage.decoder_lr, recipe.clip_norm)
        self.counters["samples"] += sum(len(group) for group in groups)
        for name, value in parts.items():
            self._window[name].append(value)
        self._window["drawn_share"].append(drawn / max(1e-9, time.process_time() - started))

    def _batch(self, group: list[Example]) -> Batch:
        return collate(group, self.tokenizer)

    def _count_exact(self, batch: Batch, exact: torch.Tensor, lines: torch.Tensor) -> None:
        for row, task in zip(exact.tolist(), batch.tasks, strict=False):
            self._window[f"exact/{task}"] += [float(value == 1) for value in row if value >= 0]
        if len(lines):
            self._window["exact/seen"] += lines.float().tolist()

    def draw(self, step: int) -> list[Example]:
        """The examples of a step; they depend on the recipe, the packs and the step alone."""
        mix = self.recipe.at(self.minutes)[0].mix
        rng = np.random.default_rng([self.recipe.seed, step])
        total = sum(mix.values())
        examples: list[Example] = []
        context = Context(
            self.packs,
            rng,
            proposals=self.proposals,
            exchanged=self.recipe.exchanged_receipts,
            respelled=self.recipe.respelled_receipts,
        )
        for name in sorted(mix):
            wanted = mix[name] / total * self.recipe.step_positions / self._cost(name)
            for _ in range(int(wanted + rng.random())):
                examples += examples_of(name, context)
        return examples if examples else self.draw(step + 1_000_000_000)

    def _cost(self, exercise: str) -> float:
        """About how many positions one draw of an exercise takes; a visual token costs 1.7 more than a letter."""
        if exercise not in self._costs:
            rng = np.random.default_rng(0)
            drawn = [e for _ in range(4) for e in examples_of(exercise, Context(self.packs, rng))]
            answers = sum(len(q.answer) + len(q.question) // 3 + 9 for e in drawn for q in e.queries)
            tokens = sum(e.tokens * (2.7 if e.queries else 1.7) for e in drawn)
            self._costs[exercise] = max(1.0, (answers + tokens) / 4)
        return self._costs[exercise]

    def _say(self) -> None:
        """Log the means since the last time; of several processes, those of the first one's share."""
        figures = {name: round(float(np.mean(values)), 3) for name, values in sorted(self._window.items())}
        self._window.clear()
        self._log("train", figures)

    def _log(self, kind: str, figures: dict[str, float]) -> None:
        entry = {
            "step": self.counters["step"],
            "samples": self.counters["samples"],
            "minutes": round(self.minutes, 2),
            "stage": self.recipe.at(self.minutes)[0].name,
            kind: figures,
        }
        if not self.processes.first:
            return
        print(json.dumps(entry), flush=True)
        append_to_curve(self.output / CURVE_FILE, entry)

    def evaluate(self) -> dict[str, float]:
        """Held-out exact match, written to the curve."""
        recipe = self.recipe
        if not self.processes.first:
            return {}
        figures = measure(self.guided, self.tokenizer, self.packs, recipe.evaluate, recipe.evaluate_examples)
        self._log("held_out", figures)
        return figures

    def _save(self) -> None:
        """Save the state, once a step."""
        if self.processes.first and self._saved_step != self.counters["step"]:
            save_state(self.output / STATE_FILE, self.masters, self.counters, self._settings)
            self._saved_step = self.counters["step"]

    def export(self, folder: Path) -> None:
        """The model as a folder that transformers loads."""
        if not self.processes.first:
            return
        prefix = "model."
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in self.masters.weights.items()
            if name.startswith(prefix)
        }
        export_model(self.guided.model, self.tokenizer, folder, weights)


RecipeOption = Annotated[Path, typer.Option(help="YAML file that says what to train.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]


@app.command("pack")
def pack_command(recipe: RecipeOption) -> None:
    """Draw the pictures that the recipe trains on, once."""
    make_packs(load_recipe(recipe))


@app.command("propose")
def propose_command(
    recipe: RecipeOption,
    model: Annotated[Path, typer.Option(help="Folder of a model with a region branch.")],
    output: OutputOption = Path("runs/tiny-proposals"),
) -> None:
    """Draw the boxes that a model's region branch proposes for the packs' questions."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    packs = open_packs(load_recipe(recipe))
    output.mkdir(parents=True, exist_ok=True)
    zoomer = QZoom.from_pretrained(str(model))
    for name in PROPOSED_PACKS:
        if name in packs:
            propose(zoomer, packs[name], output / f"{name}.jsonl", report=_progress(name))


@app.command("held-out")
def held_out_command(
    receipts: Annotated[Path, typer.Option(envvar="QZOOM_RECEIPTS", help="Folder of the scanned receipts.")],
    output: OutputOption = Path("runs/tiny-held-out"),
) -> None:
    """Copy the receipts that the reader never sees, for the gate's labels."""
    typer.echo(f"{ReceiptFolder(receipts, 'held_out').copy_to(output)} pictures in {output}.")


@app.command("train")
def train_command(
    recipe: RecipeOption,
    output: OutputOption = Path("runs/tiny"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    *,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run in the output folder.")] = False,
) -> None:
    """Train; a stopped run goes on when the same command is given again."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device} is not supported; use cpu or cuda.")
    settings = load_recipe(recipe)
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    first = os.environ.get("RANK", "0") == "0"
    with training_in(output, fresh=fresh) if first else contextlib.nullcontext():
        run = Run(settings, output.resolve(), device)
        before = run.minutes
        done = run.loop()
    if not run.processes.first:
        return
    if not done:
        typer.echo("Stopped; the same command goes on from here.")
    elif run.minutes == before:
        typer.echo(
            f"Nothing was left to train: the run in {output} is at minute {before:.1f} and the recipe ends at minute "
            f"{settings.minutes:.1f}; give a stage more `minutes` to go on. The model is in {output / MODEL_FOLDER}."
        )
    else:
        typer.echo(f"The model is in {output / MODEL_FOLDER}.")


@app.command("measure")
def measure_command(recipe: RecipeOption, output: OutputOption = Path("runs/tiny")) -> None:
    """Measure the run's newest state and add the figures to its curve."""
    require_state(output)
    typer.echo(json.dumps(Run(load_recipe(recipe), output.resolve()).evaluate(), indent=2))


@app.command("average")
def average_command(
    models: Annotated[list[Path], typer.Argument(help="Folders of models trained from the same start.")],
    output: OutputOption = Path("runs/mean"),
) -> None:
    """Write the mean of two or more models that went different ways from the same start."""
    average_models(models, output)
    typer.echo(f"The mean of {len(models)} models is in {output}.")


def main() -> None:
    """Run the command line; a known mistake ends with one sentence."""
    try:
        app(standalone_mode=True)
    except QZoomError as error:
        typer.echo(str(error), err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
