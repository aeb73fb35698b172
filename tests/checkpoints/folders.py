"""Checkpoint folders of tiny random models, written without the code under test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from qzoom.engine.state import Engine
from qzoom.errors import CheckpointError
from tests import tiny_models

PREFIX = {"qwen3_vl": "model.language_model.", "qwen2_5_vl": "model."}
FIELDS: dict[str, Any] = {
    "enable_twig": True,
    "enable_high_res": True,
    "twig_K": 3,
    "twig_T": 3,
    "high_res_K": 3,
    "high_res_T": 3,
    "high_res_thresh": 0.25,
    "reuse_src_pos": True,
    "roi_source": "qk",
    "roi_enable2stage": True,
    "roi_keep_ffn_mod_ratio": 1000,
    "add_noise_to_roi": False,
}


@contextmanager
def refused(*said: str, kind: type[Exception] = CheckpointError) -> Iterator[None]:
    """What is done inside ends with one sentence on one line that holds all of these."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for piece in said:
        assert piece in text, text


def engine(family: str, dtype: torch.dtype = torch.float32) -> Engine:
    return tiny_models.engine(family, dtype=dtype)


def write_plain(made: Engine, folder: Path) -> Path:
    """A base model as transformers writes it, with its processor files."""
    made.backbone.model.save_pretrained(folder)
    made.backbone.tokenizer.save_pretrained(folder)
    made.backbone.image_processor.save_pretrained(folder)
    return folder


def write_merged(made: Engine, folder: Path, *, shard_bytes: int | None = None, **changes: Any) -> Path:
    """A merged checkpoint in the authors' key layout; `changes` go into its config fields, None removes one."""
    write_plain(made, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    prefix = PREFIX[made.backbone.family]
    assert made.gate is not None
    assert made.region is not None
    tensors |= {f"{prefix}twig_{name}": value for name, value in made.region.state_dict().items()}
    tensors |= {f"{prefix}high_res_{name}": value for name, value in made.gate.state_dict().items()}
    save_torch_state_dict(tensors, folder, max_shard_size=shard_bytes or "5GB")
    edit_json(folder / "config.json", **(FIELDS | changes))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one. Sorted, as transformers writes it."""
    values = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in values.items() if not (key in changes and value is None)}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors into a single-file checkpoint."""
    save_torch_state_dict({name: value.clone() for name, value in tensors.items()}, folder)


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def same_branches(left: Engine, right: Engine) -> bool:
    for name in ("gate", "region"):
        a, b = getattr(left, name), getattr(right, name)
        if (a is None) != (b is None) or (a is not None and not same_tensors(a.state_dict(), b.state_dict())):
            return False
    return True
