"""Models written in another layout: the authors' as transformers has it, and back, without building a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qzoom.backbones.base import ReleasedLayout
from qzoom.backbones.registry import backbone_class
from qzoom.checkpoints.base import load_processor
from qzoom.checkpoints.hub import Source
from qzoom.checkpoints.released import empty_model, stock_places
from qzoom.checkpoints.upstream import base_of
from qzoom.checkpoints.weights import Change, Copy, Place, WeightIndex, copy_weights, read_json
from qzoom.errors import CheckpointError

ROWS = 64
"""Tables of converted models are padded to a multiple of this, so that placeholders of pictures have a row."""


def write_stock(
    source: Source,
    layout: ReleasedLayout,
    target: Path,
    *,
    fill: str | None = None,
    changes: Mapping[str, Change] | None = None,
) -> Copy:
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
        raise CheckpointError(f"{source.name} lacks {', '.join(missing[:4])}, and so does what it was filled from.")
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


def released_places(
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
