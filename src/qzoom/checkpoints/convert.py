"""From one kind of checkpoint to another without building a model: tensors are copied by name, file by file.

Merged to ours and back gives the same bits in the same files. Most memory used at once is one weight file.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qzoom import __version__
from qzoom.backbones.base import ReleasedLayout
from qzoom.backbones.lora import LoraWeights
from qzoom.backbones.registry import backbone_class
from qzoom.checkpoints.base import load_processor
from qzoom.checkpoints.branches import check_branch, decoder_prefix, fill_last_layer
from qzoom.checkpoints.format import (
    HERE,
    AdapterConfig,
    BaseReference,
    Kind,
    decoder_sizes,
    detect_kind,
    family_of,
    read_adapter_config,
)
from qzoom.checkpoints.hub import Source, find_source
from qzoom.checkpoints.load import find_base
from qzoom.checkpoints.lora import read_lora
from qzoom.checkpoints.released import empty_model, stock_places
from qzoom.checkpoints.upstream import (
    PROVENANCE_KEY,
    ZOOM_KEY,
    base_of,
    branch_keys,
    is_branch_key,
    is_upstream,
    presets_of,
    read_zoom_config,
    released_facts,
    to_upstream_fields,
    upstream_fields,
)
from qzoom.checkpoints.weights import (
    MAX_FILE_BYTES,
    Change,
    Copied,
    Place,
    WeightIndex,
    copy_weights,
    maps_digest,
    merge_weights,
    read_index,
    read_json,
    read_tensors,
)
from qzoom.checkpoints.writing import atomic_folder, check_target, copy_side_files
from qzoom.errors import CheckpointError, listed


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did."""

    source: str  # what was read
    target: Path  # the folder written
    read_kind: Kind  # "adapter", "upstream" or "plain"
    written_kind: Kind  # the same for the target
    tensors: int  # how many were written
    size_bytes: int  # their size
    notes: tuple[str, ...] = ()  # what a reader of the target should know, one sentence each


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    answer_only: bool = False,
    base: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> ConvertReport:
    """Convert a merged checkpoint to ours, ours to a merged one, or either to a plain model that answers only.

    LoRA weights of ours become part of the model that is written. Where transformers does not read the authors' layout,
    ours and the plain model have its own.

    Args:
        src: folder or hub id.
        dst: a new or empty folder, or a checkpoint of the kind to be written, which is replaced.
        answer_only: leave the branches out.
        base: hub id or folder of a complete model of the family, for what the checkpoint lacks; None: the one that a
            published checkpoint is known to need.
        max_file_bytes: most that one file of our branches may hold; the base model's files stay as they are.

    Raises:
        CheckpointError: nothing to convert, tensors that do not fit, or a target that holds something else.
    """
    source, target = find_source(src), Path(dst)
    read = detect_kind(source.folder)
    if read is None:
        raise CheckpointError(f"{source.name} has neither config.json nor qzoom_config.json, so it is no model.")
    if read == "plain" and not (answer_only and is_upstream(read_json(source.folder / "config.json"))):
        raise CheckpointError(f"{source.name} is a plain model already; it has no branches to convert or leave out.")
    written: Kind = "plain" if answer_only else "adapter" if read == "upstream" else "upstream"
    if target.is_dir() and target.resolve() == source.folder.resolve():
        raise CheckpointError(f"{target} cannot be converted in place; choose another folder to write to.")
    check_target(target, written)
    if read != "adapter":
        work = _strip(source, target, fill=base) if answer_only else _to_adapter(source, target, base, max_file_bytes)
    else:
        adapter = read_adapter_config(source.folder)
        own = find_base(adapter, source)
        lora = read_lora(source.folder, adapter.lora_base_weights) if adapter.lora_base_weights else None
        work = _strip(own, target, lora) if answer_only else _to_upstream(source, adapter, own, target, lora)
    return ConvertReport(source.name, target, read, written, *work)


Work = tuple[int, int, tuple[str, ...]]


def _strip(base: Source, target: Path, lora: LoraWeights | None = None, fill: str | None = None) -> Work:
    """A plain model: base tensors, the config without our or the authors' fields, processor files."""
    index = read_index(base.folder)
    changes = _merged_maps(index, lora)
    layout = _layout(base.folder)
    with atomic_folder(target, "plain") as part:
        if layout is not None:
            return (*_write_stock(base, layout, part, fill=fill, changes=changes), _lora_note(lora))
        done = merge_weights(index, _base_names(index), part, changes=changes)
        _write_settings(base.folder, part)
        copy_side_files(base.folder, part)
    return (*done, _lora_note(lora))


def _layout(folder: Path) -> ReleasedLayout | None:
    """The authors' layout that a folder has, where transformers does not read it."""
    settings = read_json(folder / "config.json")
    family_of(settings, str(folder))
    return backbone_class(settings["model_type"]).released_layout(settings)


def _to_adapter(source: Source, target: Path, fill: str | None, max_file_bytes: int) -> Work:
    """Merged to ours: the plain model and the branches beside it in one folder."""
    where = str(source.folder)
    settings = read_json(source.folder / "config.json")
    family = family_of(settings, where)
    index = read_index(source.folder)
    zoom = read_zoom_config(settings, backbone_class(family).zoom_defaults(), f"{where}/config.json")
    keys = branch_keys(index.tensors)
    if not zoom.branch_norm:
        keys.region.pop("norm.weight", None)
    layout = _layout(source.folder)
    has_gate = bool(settings.get("enable_high_res"))
    for wanted, names, what in ((True, keys.region, "region branch"), (has_gate, keys.gate, "gate")):
        if wanted:
            check_branch(index, names, index, zoom, what=what, where=where)
    kept: dict[str, Any] = {"fields": upstream_fields(settings)}
    if layout is not None:
        kept["settings"] = {key: value for key, value in settings.items() if key not in kept["fields"]}
        kept["names"] = sorted(index.tensors.keys() - {*keys.region.values(), *keys.gate.values()})
    if index.sharded and ZOOM_KEY not in settings:
        kept["shards"] = {name: index.tensors[name].file for name in index.tensors if is_branch_key(name)}
    if ZOOM_KEY not in settings:
        zoom = zoom.replace(provenance={PROVENANCE_KEY: kept}, presets=presets_of(source.name))
    base = BaseReference(HERE, None, family, *decoder_sizes(settings, f"{where}/config.json"))
    with atomic_folder(target, "adapter") as part:
        if layout is not None:
            done = _write_stock(source, layout, part, fill=fill)
        else:
            done = merge_weights(index, _base_names(index), part)
            _write_settings(source.folder, part)
            copy_side_files(source.folder, part)
        renamed = {f"region.{ours}": (index, stored) for ours, stored in keys.region.items()}
        renamed |= {f"gate.{ours}": (index, stored) for ours, stored in keys.gate.items()}
        more = copy_weights(renamed, part, "qzoom", max_file_bytes)
        AdapterConfig(base, zoom, gate=has_gate, region=True, qzoom_version=__version__).save(part)
    return done[0] + more[0], done[1] + more[1], ()


def _to_upstream(source: Source, adapter: AdapterConfig, base: Source, target: Path, lora: LoraWeights | None) -> Work:
    """Ours to merged: the branches go under the language model, in the files where they once were."""
    if not adapter.region:
        raise CheckpointError(f"{source.name} has no region branch, without which a merged checkpoint cannot work.")
    index, own = read_index(base.folder), read_index(source.folder, stem="qzoom")
    settings = read_json(base.folder / "config.json")
    family = family_of(settings, str(base.folder))
    zoom, prefix = adapter.zoom, decoder_prefix(index)
    region = {n.removeprefix("region."): n for n in own.tensors if n.startswith("region.")}
    gate = {n.removeprefix("gate."): n for n in own.tensors if n.startswith("gate.")}
    where = str(source.folder)
    check_branch(own, region, index, zoom, what="region branch", where=where, may_lack_unused=True)
    if adapter.gate:
        check_branch(own, gate, index, zoom, what="gate", where=where)
    changes = _merged_maps(index, lora)
    notes = list(_lora_note(lora))
    filled = fill_last_layer(region, index, prefix, zoom)
    if filled:
        last = zoom.shared_layers + zoom.branch_layers - 1
        notes.append(f"{len(filled)} tensors that are never used were filled in from base layer {last}.")
    defaults = backbone_class(family).zoom_defaults()
    fields = to_upstream_fields(zoom, has_gate=adapter.gate, defaults=defaults)
    if ZOOM_KEY in fields:
        notes.append(f"The authors' fields cannot express all settings; they are under {ZOOM_KEY!r} in config.json.")
    stored = {f"{prefix}twig_{ours}": name for ours, name in region.items()}
    stored |= {f"{prefix}high_res_{ours}": name for ours, name in gate.items()}
    with atomic_folder(target, "upstream") as part:
        kept = released_facts(zoom) or {}
        shards = kept.get("shards", {})
        added = {new: (own, old) for new, old in stored.items()} | {new: (index, old) for new, old in filled.items()}
        layout = backbone_class(family).released
        if layout is not None and _layout(base.folder) is None:
            origin: dict[str, Any] = {"prefix": prefix, "kept": kept}
            places, cut, flat = _released_places(index, settings, layout, added, changes=changes, **origin)
            done = copy_weights(places, part, "model", changes=cut)
            (part / "config.json").write_text(json.dumps(flat | fields, indent=2, sort_keys=True) + "\n")
        else:
            done = merge_weights(index, _base_names(index), part, added=added, files=shards, changes=changes)
            _write_settings(base.folder, part, fields)
        copy_side_files(base.folder, part)
        if source.folder != base.folder:
            copy_side_files(source.folder, part, lambda name: not (part / name).exists())
    return (*done, tuple(notes))


def _merged_maps(index: WeightIndex, lora: LoraWeights | None) -> dict[str, Change]:
    """The base's tensors that LoRA weights are added to, by name, and how (CheckpointError: it is another base)."""
    if lora is None:
        return {}
    prefix, where = decoder_prefix(index), str(index.folder)
    names = {target: f"{prefix}{target}.weight" for target in lora.targets}
    lacking = [name for name in names.values() if name not in index.tensors]
    if lacking:
        raise CheckpointError(
            f"{where} has no {lacking[0]}, to which LoRA weights are to be added; it is another base."
        )

    def weight_of(target: str) -> Tensor:
        return read_tensors(index, [names[target]])[names[target]]

    lora.check(maps_digest(lora.targets, weight_of), where)
    return {name: functools.partial(lora.added, target) for target, name in names.items()}


def _lora_note(lora: LoraWeights | None) -> tuple[str, ...]:
    return () if lora is None else (f"LoRA weights were added to {len(lora.targets)} of the base's tensors.",)


def _write_settings(source: Path, target: Path, fields: dict[str, Any] | None = None) -> None:
    """config.json without branch fields, or with these; laid out and sorted as it was."""
    settings = read_json(source / "config.json")
    text = (source / "config.json").read_text(encoding="utf-8")
    indent = re.match(r"\{\n( +)", text)
    out = {key: value for key, value in settings.items() if key not in upstream_fields(settings)} | (fields or {})
    if list(settings) == sorted(settings):
        out = dict(sorted(out.items()))
    new = json.dumps(out, indent=len(indent[1]) if indent else 2, ensure_ascii=text.isascii())
    (target / "config.json").write_text(new + "\n" * text.endswith("\n"), encoding="utf-8")


def _base_names(index: WeightIndex) -> list[str]:
    return [name for name in index.tensors if not is_branch_key(name)]


# -- the authors' layout, where transformers does not read it ----------------------------------------------------------

ROWS = 64
"""Tables of converted models are padded to a multiple of this, so that placeholders of pictures have a row."""


def _write_stock(
    source: Source,
    layout: ReleasedLayout,
    target: Path,
    *,
    fill: str | None = None,
    changes: Mapping[str, Change] | None = None,
) -> Copied:
    """A released model as transformers has it, complete, with tokenizer, image processor and chat template.

    The token tables get rows for the placeholder of a picture, copies of the first row: an output that is never chosen.

    Args:
        fill: see `stock_places`.
        changes: what to make of some tensors, by their stored names.
    """
    settings = read_json(source.folder / "config.json")
    config, places = stock_places(source.folder, settings, layout, base=fill or base_of(source.name))
    missing = sorted(set(empty_model(config).state_dict()) - places.keys())
    if missing:
        raise CheckpointError(f"{source.name} lacks {listed(missing)}, and so does what it was filled from.")
    family = backbone_class(str(settings["model_type"]))
    tokenizer, image_processor, template = load_processor(source.folder, settings)
    if family.placeholder not in tokenizer.get_vocab():
        tokenizer.add_tokens([family.placeholder], special_tokens=True)
    text = config.get_text_config()
    rows = text.vocab_size
    config.image_token_id = tokenizer.convert_tokens_to_ids(family.placeholder)
    text.vocab_size = -(-max(rows, config.image_token_id + 1) // ROWS) * ROWS
    new = {name: changes[old] for name, (_, old) in places.items() if changes and old in changes}
    new |= {name: _table(rows, text.vocab_size) for name in layout.table}
    done = copy_weights(places, target, "model", changes=new)
    config.architectures = [type(empty_model(config)).__name__]
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    image_processor.save_pretrained(target)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return done


def _released_places(
    index: WeightIndex,
    settings: Mapping[str, Any],
    layout: ReleasedLayout,
    added: Mapping[str, Place],
    *,
    prefix: str,
    kept: Mapping[str, Any],
    changes: Mapping[str, Change],
) -> tuple[dict[str, Place], dict[str, Change], dict[str, Any]]:
    """A model of transformers' layout in the authors' own.

    Args:
        added: branch tensors under the decoder, with its prefix.
        prefix: of the decoder's names in the index.
        kept: of the authors' files that it once came from: "settings" and "names"; empty for others.

    Returns:
        Where the tensors are by their new names, what to make of some, and the config.json without branch fields.
    """
    flat = kept.get("settings") or layout.settings(settings)
    places, cut = {}, {}
    for old in index.tensors:
        stock = layout.stock_name(old)
        if stock is None:
            continue
        new = layout.released_name(stock)
        if "names" not in kept or new in kept["names"]:
            places[new] = (index, old)
            if old in changes:
                cut[new] = changes[old]
            if stock in layout.table:
                cut[new] = _table(int(flat["vocab_size"]), int(flat["vocab_size"]))
    first = "layers.0.input_layernorm.weight"
    own = layout.released_name(str(layout.stock_name(prefix + first))).removesuffix(first)
    places |= {own + name.removeprefix(prefix): place for name, place in added.items()}
    for new, old in layout.copies.items():
        if "names" not in kept or new in kept["names"]:
            source = next(name for name in index.tensors if layout.stock_name(name) == old)
            places[new] = (index, source)
            cut[new] = _table(int(flat["vocab_size"]), int(flat["vocab_size"]))
    return places, cut, dict(flat)


def _table(rows: int, wanted: int) -> Change:
    """The first `rows` rows of a token table, padded to the wanted number with copies of the first."""

    def change(tensor: Tensor) -> Tensor:
        kept = tensor[:rows]
        return kept if wanted == rows else kept[[*range(rows), *[0] * (wanted - rows)]]

    return change
