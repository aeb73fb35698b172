"""`qzoom label regions` without the command line: find heads, open the store, label in one or more processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import ConfigError
from qzoom.labels.head_search import HeadSearch, find_heads
from qzoom.labels.presets import HeadSet, Mode, parse_heads, published_heads
from qzoom.labels.processes import ModelChoice, run_shares
from qzoom.labels.region_run import LabelReport, RegionRun, label_questions, report_of
from qzoom.records.schema import Provenance, Question
from qzoom.records.shards import write_synced
from qzoom.records.store import start_store

if TYPE_CHECKING:
    from qzoom.engine.state import Engine

__all__ = ["LabelRegions", "base_digest", "choose_heads", "label_regions"]


@dataclass(frozen=True, slots=True)
class LabelRegions:
    """The job of one process."""

    run: RegionRun

    def __call__(
        self, engine: Engine, questions: Sequence[Question], folder: Path, number: int, on_question: Callable[[], None]
    ) -> None:
        """Label a share."""
        label_questions(engine, self.run, questions, folder, number=number, on_question=on_question)


def base_digest(engine: Engine) -> str:
    """Digest of the base model's weights alone, whatever number format they were loaded in: what labels belong to.

    LoRA weights count as such, since their sum with the base's depends on the format that it is rounded to.
    """
    import torch

    lora = engine.backbone.lora
    merged = () if lora is None else tuple(f".{target}.weight" for target in lora.targets)
    digest = hashlib.sha256(b"" if lora is None else lora.digest.encode())
    for name, tensor in sorted(engine.backbone.model.state_dict().items()):
        if name.endswith(merged) and "visual" not in name:
            continue
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 512)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def choose_heads(
    engine: Engine, how: str, modes: Sequence[Mode], search: HeadSearch, sinks: str = ""
) -> tuple[dict[Mode, HeadSet], dict[str, Any]]:
    """Heads for the modes that occur.

    Args:
        engine: the model.
        how: "auto" (find them), "preset" (the authors' tables), or heads as "22:1,4 23:6,11".
        modes: those that occur.
        search: how to find them.
        sinks: sink heads, written likewise; "" takes the preset's, else none.

    Returns:
        The heads, and what was found out, as JSON values.

    Raises:
        ConfigError: heads that the model does not have, or no preset for it.
    """
    backbone = engine.backbone
    own = parse_heads(sinks) if sinks else ()
    chosen: dict[Mode, HeadSet] = {}
    facts: dict[str, Any] = {}
    for mode in modes:
        if how == "auto":
            found = find_heads(engine, mode, search)
            chosen[mode] = dataclasses.replace(found.heads, sinks=own)
            facts[mode] = {"samples": found.samples, "scores": [asdict(score) for score in found.scores]}
        elif how == "preset":
            preset = published_heads(backbone.family, backbone.hidden_size, backbone.num_layers, mode)
            if preset is None:
                raise ConfigError(
                    f"There is no table of heads for a {backbone.family} of {backbone.num_layers} layers and width "
                    f"{backbone.hidden_size}; use --heads auto, or name them."
                )
            chosen[mode] = HeadSet(preset.pointing, own or preset.sinks)
        else:
            chosen[mode] = HeadSet(parse_heads(how), own)
        _check_heads(engine, chosen[mode])
    return chosen, facts


def label_regions(
    choice: ModelChoice,
    questions: Sequence[Question],
    folder: Path,
    run: RegionRun,
    *,
    heads: str = "auto",
    sinks: str = "",
    search: HeadSearch | None = None,
    seed: int = 0,
    processes: int = 1,
    fresh: bool = False,
    on_question: Callable[[int], None] = lambda _: None,
) -> LabelReport:
    """Label questions; a rerun continues.

    Args:
        choice: the model.
        questions: what to label.
        folder: the store to fill.
        run: how; its heads are replaced by the chosen ones.
        heads: see `choose_heads`.
        sinks: likewise.
        search: how heads are found; None uses the run's look.
        seed: noted in the records.
        processes: how many label at once.
        fresh: start over.
        on_question: called with the number of questions done since the last call.

    Raises:
        ConfigError: the folder's records were made in another way.
        DataError: a process died, or the disk refuses.
    """
    engine = choice.load()
    modes: list[Mode] = sorted({question.mode for question in questions})
    looked = search or HeadSearch(tokens=run.tokens, view=run.view, max_new_tokens=min(32, run.max_new_tokens))
    weights = base_digest(engine)
    asked = {"heads": heads, "sinks": sinks, "modes": list(modes), "search": asdict(looked)}
    chosen = _kept_heads(engine, folder, {"asked": asked, "weights": weights}, modes, looked, fresh)
    run = dataclasses.replace(run, heads=chosen)
    config = engine.backbone.model.config
    provenance = Provenance(
        model=choice.name,
        weights=weights,
        revision=getattr(config, "_commit_hash", None) or choice.revision,
        prompt="question, or question and request for a box",
        seed=seed,
        sizes={"tokens": run.tokens, "view": run.view, "max_new_tokens": run.max_new_tokens},
    )
    start_store(folder, "regions", run.settings(), provenance, fresh=fresh)
    share = engine if processes == 1 else None
    run_shares(LabelRegions(run), choice, share, questions, folder, processes=processes, on_question=on_question)
    return report_of(folder)


def _kept_heads(
    engine: Engine,
    folder: Path,
    identity: dict[str, Any],
    modes: Sequence[Mode],
    search: HeadSearch,
    fresh: bool,
) -> dict[Mode, HeadSet]:
    """The heads that an earlier call found with the same model and wish, since finding them takes minutes; else new."""
    path = folder / "heads.json"
    kept = None if fresh else _found_before(path, identity)
    if kept is not None:
        return kept
    asked = identity["asked"]
    chosen, facts = choose_heads(engine, asked["heads"], modes, search, asked["sinks"])
    folder.mkdir(parents=True, exist_ok=True)
    found = {"identity": identity, "heads": {mode: asdict(heads) for mode, heads in chosen.items()}, "found": facts}
    write_synced(path, (json.dumps(found, indent=2) + "\n").encode())
    return chosen


def _check_heads(engine: Engine, heads: HeadSet) -> None:
    layers, count = engine.backbone.num_layers, int(engine.backbone.text_config.num_attention_heads)
    for layer, head in (*heads.pointing, *heads.sinks):
        if layer >= layers or head >= count:
            raise ConfigError(f"Head {layer}:{head} does not exist; the model has {layers} layers of {count} heads.")


def _found_before(path: Path, identity: dict[str, Any]) -> dict[Mode, HeadSet] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] != json.loads(json.dumps(identity)):
            return None
        return {
            mode: HeadSet(_pairs(value["pointing"]), _pairs(value["sinks"])) for mode, value in kept["heads"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(head)) for layer, head in values)
