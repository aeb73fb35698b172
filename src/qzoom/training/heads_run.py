"""Run a heads recipe: one command from a base model to a finished adapter, labelling in several processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.training.heads import (
    HeadsReport,
    Pairs,
    agreement,
    build_heads,
    label_share,
    probe_heads,
    train_gate,
    train_region,
)
from qzoom.training.heads_recipe import HeadsRecipe
from qzoom.training.heads_zoom import ZOOM_SHARDS, label_zoom_share

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["half_width", "run_heads"]

REGION_FILE = "region.safetensors"


def run_heads(
    recipe: HeadsRecipe,
    output: Path,
    *,
    processes: int = 1,
    fresh: bool = False,
    on_label: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str, int, float], None] = lambda *_: None,
) -> tuple[Engine, HeadsReport]:
    """Rank heads, label, fit.

    Args:
        recipe: what to do.
        output: folder of everything made on the way; a rerun continues from it.
        processes: labelling processes, one thread each.
        fresh: start over.
        on_label: called with the number of pictures labelled since the last call.
        on_step: called with the branch, the step and its loss.

    Returns:
        The engine with trained branches, and the report.

    Raises:
        ConfigError: the folder holds another recipe's work.
        DataError: a labelling process died.
    """
    from safetensors.torch import save_file

    from qzoom.checkpoints.load import load_engine

    if fresh:
        _forget(output)
    output.mkdir(parents=True, exist_ok=True)
    _check_same_recipe(recipe, output, processes)
    base = load_engine(recipe.base, dtype="float32")
    engine = build_heads(base, recipe)
    heads = _heads(engine, recipe, output / "heads.json")
    _label(engine, recipe, heads, output, processes, on_label, zoom=False)
    examples, losses = train_region(engine, recipe, output, on_step)
    save_file(_region_weights(engine), output / REGION_FILE)
    if recipe.gate_labels == "zoom":
        _label(engine, recipe, heads, output, processes, on_label, zoom=True)
    counts, gate_losses = train_gate(engine, recipe, output, on_step)
    report = HeadsReport(heads, agreement(examples), len(examples), counts, losses, gate_losses)
    (output / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    made = {"recipe": asdict(recipe), "report": asdict(report)}
    config = engine.config.replace(provenance=json.loads(json.dumps(made)))
    return Engine(engine.backbone, engine.gate, engine.region, config), report


def half_width(engine: Engine) -> Engine:
    """The engine in bfloat16, in place, as it is stored."""
    import torch

    engine.backbone.model.to(torch.bfloat16)
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.to(torch.bfloat16)
    return engine


def _forget(output: Path) -> None:
    """Remove what an earlier run left in the folder, and nothing else."""
    for pattern in ("region-*.safetensors", "gate-*.safetensors", f"{ZOOM_SHARDS}-*.safetensors", "*.partial"):
        for path in output.glob(pattern):
            path.unlink()
    for name in ("recipe.json", "heads.json", "report.json", REGION_FILE):
        (output / name).unlink(missing_ok=True)


def _weights_hash(base: str) -> str:
    """Names the base's weights, when it is a folder; labels of other weights would not fit."""
    digest = hashlib.sha256()
    for path in sorted(Path(base).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_same_recipe(recipe: HeadsRecipe, output: Path, processes: int) -> None:
    """Labels of one recipe and base must not be mixed with another's; the fitting may change."""
    fitting = {"steps", "gate_steps", "batch", "learning_rate", "region_threshold", "gate_threshold", "gate_labels"}
    wanted: dict[str, Any] = {k: v for k, v in asdict(recipe).items() if k not in fitting}
    wanted = json.loads(json.dumps(wanted | {"processes": processes, "weights": _weights_hash(recipe.base)}))
    path = output / "recipe.json"
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(k for k in wanted if found.get(k) != wanted[k])
    if changed:
        raise ConfigError(
            f"{output} holds labels made with other settings of {', '.join(changed)}; use --fresh or another --output."
        )


def _heads(engine: Engine, recipe: HeadsRecipe, path: Path) -> Pairs:
    """The heads to take attention from, found once."""
    if not path.exists():
        found = probe_heads(engine, recipe)
        path.write_text(json.dumps([list(pair) for pair in found]) + "\n", encoding="utf-8")
    return tuple((int(a), int(b)) for a, b in json.loads(path.read_text(encoding="utf-8")))


def _region_weights(engine: Engine) -> dict[str, Tensor]:
    assert engine.region is not None
    return {name: weight.detach().contiguous() for name, weight in engine.region.state_dict().items()}


def _label(
    engine: Engine,
    recipe: HeadsRecipe,
    heads: Pairs,
    output: Path,
    processes: int,
    on_label: Callable[[int], None],
    *,
    zoom: bool,
) -> None:
    """Make the labels from the base's answers, or (`zoom`) those that need the trained region branch."""
    if processes > 1:
        _label_in_processes(recipe, heads, output, processes, on_label, zoom)
    elif zoom:
        label_zoom_share(engine, recipe, output, 0, 1, lambda: on_label(1))
    else:
        label_share(engine, recipe, heads, output, 0, 1, lambda: on_label(1))


def _label_in_processes(
    recipe: HeadsRecipe, heads: Pairs, output: Path, processes: int, on_label: Callable[[int], None], zoom: bool
) -> None:
    context = multiprocessing.get_context("spawn")
    done: Queue[int] = context.Queue()
    workers = [
        context.Process(target=_label_worker, args=(recipe, heads, output, rank, processes, done, zoom), daemon=True)
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.join(timeout=0.5)
        count = 0
        while not done.empty():
            count += done.get()
        on_label(count)
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise DataError(f"A labelling process ended with code {failed[0]}; its shards are kept, run the command again.")


def _label_worker(
    recipe: HeadsRecipe, heads: Pairs, output: Path, rank: int, world: int, done: Queue[int], zoom: bool
) -> None:
    import torch
    from safetensors.torch import load_file

    from qzoom.checkpoints.load import load_engine

    torch.set_num_threads(1)
    engine = build_heads(load_engine(recipe.base, dtype="float32"), recipe)
    if not zoom:
        label_share(engine, recipe, heads, output, rank, world, lambda: done.put(1))
        return
    assert engine.region is not None
    engine.region.load_state_dict(load_file(output / REGION_FILE))
    label_zoom_share(engine, recipe, output, rank, world, lambda: done.put(1))
