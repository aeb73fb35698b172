"""Files as older releases wrote them, and folders that were saved over: read, or one sentence that names the keys."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict

from qzoom.checkpoints.load import load_engine
from qzoom.errors import CheckpointError
from qzoom.model import QZoom
from tests import tiny_models
from tests.checkpoints import folders

PICTURE = tiny_models.picture(5, 300, 220)


def release_4(name: str) -> str:
    """Names up to transformers 4.51: the decoder at the top."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def release_5(name: str) -> str:
    """Names as modules have them in transformers 5."""
    if name.startswith("visual."):
        return f"model.{name}"
    inner = name.removeprefix("model.")
    return (
        name if name == inner or inner.startswith(("language_model.", "visual.")) else f"model.language_model.{inner}"
    )


def old_config(folder: Path) -> None:
    """A config.json as transformers 4.4x wrote it: the decoder's settings at the top, `rope_scaling`."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    for name in ("model_type", "dtype", "layer_types"):
        text.pop(name, None)
    path.write_text(json.dumps(text | config | {"torch_dtype": "float32"}))


def renamed(folder: Path, target: Path, rename: Any, *, shard_bytes: int | None = None) -> Path:
    """A copy with other tensor names."""
    folders.copy(folder, target)
    tensors = {rename(name): value.clone() for name, value in folders.all_tensors(target).items()}
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_torch_state_dict(tensors, target, max_shard_size=shard_bytes or "5GB")
    return target


def answer(folder: Path) -> Any:
    return QZoom(load_engine(folder)).ask(PICTURE, "When?", zoom="always", max_new_tokens=5, region_threshold=0.4)


@pytest.mark.parametrize("rename", [release_4, release_5])
@pytest.mark.parametrize("shard_bytes", [None, 100_000])
@pytest.mark.parametrize("config", ["new", "old"])
def test_names_of_every_release(rename, shard_bytes, config, merged, tmp_path):
    expected = answer(merged["qwen2_5_vl"])
    folder = renamed(merged["qwen2_5_vl"], tmp_path / "model", rename, shard_bytes=shard_bytes)
    names = folders.all_tensors(folder)
    assert any(name.startswith("visual." if rename is release_4 else "model.visual.") for name in names)
    assert any("twig_layers" in name for name in names)
    if config == "old":
        old_config(folder)
    assert len(list(folder.glob("*.safetensors"))) == 1 or shard_bytes
    found = answer(folder)
    assert (found.tokens, found.gate, found.regions) == (expected.tokens, expected.gate, expected.regions)


def _without(*words: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in tensors.items() if not any(word in name for word in words)}

    return change


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (_without("lm_head"), "lm_head.weight"),
        (_without("embed_tokens"), "embed_tokens.weight"),
        (_without("visual.merger"), "visual.merger"),
        (lambda tensors: {f"wrapped.{name}": value for name, value in tensors.items()}, "lm_head.weight"),
    ],
    ids=["lm_head", "token table", "merger", "unknown prefix"],
)
def test_what_is_missing_is_named_and_never_random(change, key, plain, tmp_path):
    folder = folders.copy(plain["qwen2_5_vl"], tmp_path / "model")
    folders.rewrite(folder, change(folders.all_tensors(folder)))
    with pytest.raises(CheckpointError) as caught:
        load_engine(folder)
    assert "lack" in str(caught.value)
    assert key in str(caught.value) or "and" in str(caught.value)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("stored", [True, False])
def test_a_shared_lm_head_may_be_stored_or_not(family, stored, plain, tmp_path):
    folder = folders.copy(plain[family], tmp_path / "model")
    tensors = folders.all_tensors(folder)
    table = next(value for name, value in tensors.items() if "embed_tokens" in name)
    tensors = _without("lm_head")(tensors) | ({"lm_head.weight": table.clone()} if stored else {})
    folders.rewrite(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    folders.edit_json(
        folder / "config.json",
        tie_word_embeddings=True,
        text_config=config["text_config"] | {"tie_word_embeddings": True},
    )
    backbone = load_engine(folder).backbone
    assert torch.equal(backbone.model.lm_head.weight, table)
    assert torch.equal(backbone.embedding.weight, table)


def test_a_single_file_saved_over_shards(merged, tmp_path):
    folder = renamed(merged["qwen3_vl"], tmp_path / "model", lambda name: name, shard_bytes=100_000)
    shutil.copyfile(merged["qwen3_vl"] / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"two sets of weights, model\.safetensors and the shards .*delete the one"
    ):
        load_engine(folder)
    next(folder.glob("model-*.safetensors")).unlink()
    assert answer(folder).tokens == answer(merged["qwen3_vl"]).tokens
