"""Training the embedded base model from scratch: the loop, its checkpoints and its held-out figures.

`train_base` starts one process per core (one thread each); every process draws its own examples from
(seed, step, rank), gradients are averaged, and all take the same update. A checkpoint every few minutes holds
weights, optimiser state and step, so a stopped run resumes exactly where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qzoom.training.batch import Batch, collate
from qzoom.training.draws import Draws
from qzoom.training.export import export_model, load_weights
from qzoom.training.guidance import GuidedModel
from qzoom.training.optim import Optimisers, build_optimisers
from qzoom.training.receipts import ReceiptSet, load_receipts
from qzoom.training.recipe import BaseRecipe
from qzoom.training.student.attention import use_plain_attention
from qzoom.training.tasks import make_examples
from qzoom.training.tiny import build_tiny
from qzoom.training.tokenizer import build_tokenizer

__all__ = ["train_base"]

CURVE_FILE = "training_curve.jsonl"
STATE_FILE = "state.pt"


def train_base(
    recipe: BaseRecipe, output: Path, *, device: str = "cpu", fresh: bool = False, export: Path | None = None
) -> Path:
    """Train (or go on training) the model of a recipe in `output`; returns the exported model's folder.

    `fresh` forgets an earlier run in the same folder. `export` is refreshed every few minutes while training runs.
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in (STATE_FILE, CURVE_FILE):
            (output / name).unlink(missing_ok=True)
    target = export if export is not None else output / "model"
    count = 1 if device == "cuda" else recipe.processes
    if count == 1:
        _Run(recipe, output, target, device, 0, 1).loop()
        return target
    meeting = output / f"rendezvous-{os.getpid()}"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_worker, args=(recipe, output, target, device, str(meeting)), nprocs=count)
    meeting.unlink(missing_ok=True)
    return target


def _worker(rank: int, recipe: BaseRecipe, output: Path, target: Path, device: str, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=recipe.processes)
    try:
        _Run(recipe, output, target, device, rank, recipe.processes).loop()
    finally:
        dist.destroy_process_group()


def _average_gradients(weights: list[torch.nn.Parameter]) -> None:
    """Sum the gradients of all processes (each already divided by their number) in one exchange."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([gradient.view(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class _Run:
    """One process of a run."""

    def __init__(self, recipe: BaseRecipe, output: Path, target: Path, device: str, rank: int, world: int) -> None:
        from qzoom.data.synthetic.texts import vocabulary_sentences

        self.recipe, self.output, self.target = recipe, output, target
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.tokenizer = build_tokenizer(vocabulary_sentences(), recipe.vocabulary_size)
        torch.manual_seed(recipe.seed)
        model = build_tiny(recipe.architecture, self.tokenizer, recipe.seed)
        if recipe.start_from is not None:
            load_weights(model, Path(recipe.start_from))
        use_plain_attention(model)
        self.guided = GuidedModel(
            model,
            glyph_weight=recipe.glyph_weight,
            object_weight=recipe.object_weight,
            pointing_weight=recipe.pointing_weight,
            pointing_layer=recipe.pointing_layer,
            pointing_heads=recipe.pointing_heads,
        ).to(self.device)
        self.optimisers: Optimisers = build_optimisers(
            self.guided, muon_lr=recipe.muon_lr, adamw_lr=recipe.adamw_lr, weight_decay=recipe.weight_decay
        )
        self.weights = [weight for weight in self.guided.parameters() if weight.requires_grad]
        self.receipts: ReceiptSet | None = None
        if recipe.receipts is not None:
            self.receipts = ReceiptSet(load_receipts(recipe.receipts, "train"), load_receipts(recipe.receipts, "dev"))
        self.step, self.samples, self.minutes = 0, 0, 0.0
        self.window: dict[str, list[float]] = defaultdict(list)
        self._restore()

    def loop(self) -> None:
        """All remaining steps, with checkpoints, figures and exports along the way."""
        recipe = self.recipe
        saved = exported = mark = time.monotonic()
        batches = Draws(recipe, self.tokenizer, self.receipts, self.rank).following(self.step)
        while self.step < recipe.steps:
            self._train_step(batches)
            self.step += 1
            now = time.monotonic()
            self.minutes += (now - mark) / 60
            mark = now
            if self.step % 20 == 0 and self.rank == 0:
                self._say()
            if self.step % recipe.evaluate_every == 0 and self.step < recipe.steps:
                self._evaluate(recipe.at(self.step - 1)[0].mix)
            if self.rank == 0 and now - saved > recipe.checkpoint_minutes * 60:
                self._save()
                saved = now
            if self.rank == 0 and now - exported > recipe.export_minutes * 60:
                export_model(self.guided.model, self.tokenizer, self.target)
                exported = now
        if self.rank == 0:
            self._save()
            export_model(self.guided.model, self.tokenizer, self.target)
        self._evaluate(recipe.final_tasks or recipe.stages[-1].mix)
        if self.world > 1:
            dist.barrier()

    def _train_step(self, batches: Iterator[tuple[str, Batch]]) -> None:
        recipe = self.recipe
        factor = recipe.at(self.step)[1] * min(1.0, (self.step + 1) / 50)
        self.guided.shield_tower = recipe.start_from is not None and self.step < recipe.guide_steps
        for _ in range(recipe.micro_batches):
            task, batch = next(batches)
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
                result = self.guided(batch)
            (result.loss / (recipe.micro_batches * self.world)).backward()
            self.samples += len(batch.tasks) * self.world
            self.window["loss"].append(result.answer_loss)
            self.window["glyph"].append(result.glyph_loss)
            if result.object_loss:
                self.window["object"].append(result.object_loss)
            self.window["point"].append(result.pointing_loss)
            if result.exact.numel():
                self.window[f"exact/{task}"].append((result.exact == 1).sum().item() / (result.exact >= 0).sum().item())
        trained = [weight for weight in self.weights if weight.grad is not None]
        if self.world > 1:
            _average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        self.optimisers.step(factor)

    def _say(self) -> None:
        figures = {name: round(float(np.mean(values)), 3) for name, values in sorted(self.window.items())}
        self.window.clear()
        entry = {"step": self.step, "samples": self.samples, "minutes": round(self.minutes, 1), "train": figures}
        print(json.dumps(entry), flush=True)
        self._log(entry)

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.output / CURVE_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @torch.no_grad()
    def _evaluate(self, tasks: Iterable[str]) -> None:
        """Exact match on held-out pictures for these exercises; all processes share the work."""
        figures = {}
        for number, task in enumerate(sorted(set(tasks) - {"glyphs"})):
            score = torch.zeros(2)
            for index in range(self.rank, self.recipe.evaluate_batches, self.world):
                rng = np.random.default_rng([7, number, index])
                examples = make_examples(task, rng, rng, held_out=True, receipts=self.receipts)
                batch = collate(examples, self.tokenizer).to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
                    exact = self.guided(batch).exact
                score += torch.tensor([(exact == 1).sum().item(), (exact >= 0).sum().item()])
            if self.world > 1:
                dist.all_reduce(score)
            figures[task] = round((score[0] / score[1].clamp(min=1)).item(), 4)
        if self.rank == 0:
            entry = {"step": self.step, "samples": self.samples, "minutes": round(self.minutes, 1), "held_out": figures}
            print(json.dumps(entry), flush=True)
            self._log(entry)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "samples": self.samples,
            "minutes": self.minutes,
            "guided": self.guided.state_dict(),
            "optimisers": self.optimisers.state_dict(),
        }
        part = self.output / (STATE_FILE + ".part")
        torch.save(state, part)
        part.replace(self.output / STATE_FILE)

    def _restore(self) -> None:
        path = self.output / STATE_FILE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.guided.load_state_dict(state["guided"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.step, self.samples, self.minutes = state["step"], state["samples"], state["minutes"]
