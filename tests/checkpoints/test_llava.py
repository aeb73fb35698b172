import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from qzoom.checkpoints import upstream
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.convert import convert
from qzoom.checkpoints.load import load_engine
from qzoom.engine.state import Engine
from qzoom.errors import CheckpointError
from qzoom.model import QZoom
from qzoom.training.plan import sizes_of
from tests import tiny_models
from tests.checkpoints import folders
from tests.checkpoints.folders import refused
from tests.checkpoints.test_hub import cached

PAGE = tiny_models.picture(31, 400, 300)
ROWS = len(tiny_models.tokenizer())
NEW_TO_OLD = {
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
FIELDS = {"enable_twig": True, "twig_K": 3, "twig_T": 3, "roi_branch": True, "roi_source": "qk", "roi_loss": "bce"}
FIELDS |= {"roi_super_type": "v1", "roi_multi_head": True}


def engine(**more: Any) -> Engine:
    made = tiny_models.engine("llava", **more)
    return dataclasses.replace(made, gate=None, config=made.config.replace(region_threshold=0.15, gate_threshold=0.1))


def old_name(name: str) -> str:
    start = next(start for start in NEW_TO_OLD if name.startswith(start))
    return NEW_TO_OLD[start] + name.removeprefix(start)


def released(
    made: Engine, root: Path, *, tower: str = "folder", layers: int | None = None, name: str = "model"
) -> Path:
    """A checkpoint as the authors write it: merged, without its tower; or as trained, with it but half a model."""
    folder, config = root / name, made.backbone.model.config
    folder.mkdir(parents=True)
    (root / "vision_tower").mkdir()
    config.vision_config.to_json_file(root / "vision_tower" / "config.json")
    tensors = {old_name(key): value for key, value in made.backbone.model.state_dict().items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:ROWS]
    inside = {key: value for key, value in tensors.items() if ".vision_tower." in key}
    if tower == "folder":
        tensors = {key: value for key, value in tensors.items() if key not in inside}
        own = {key.split("vision_tower.vision_tower.")[1]: value.clone() for key, value in inside.items()}
        save_file(own, root / "vision_tower" / "model.safetensors")
    if layers is not None:
        lost = [f"model.layers.{i}." for i in range(layers, tiny_models.LAYERS)]
        tensors = {
            key: value
            for key, value in tensors.items()
            if not key.startswith((*lost, "lm_head", "model.norm"))
        }  # fmt: skip
    assert made.region is not None
    tensors |= {f"model.twig_{key}": value for key, value in made.region.state_dict().items()}
    tensors["twig_head.weight"] = made.backbone.model.state_dict()["lm_head.weight"][:ROWS]
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    text = config.text_config.to_dict()
    flat = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    flat |= {"num_key_value_heads": 2, "vocab_size": ROWS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    flat |= {"eos_token_id": text["eos_token_id"], "model_type": "llava_llama", "mm_vision_tower": "../vision_tower"}
    flat |= {"mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(flat | FIELDS, indent=2, sort_keys=True) + "\n")
    tokenizer = tiny_models.copy.deepcopy(tiny_models.tokenizer())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    made.backbone.image_processor.save_pretrained(folder)
    return folder


def answers(model: Engine) -> list[Any]:
    out = []
    for options in ({"zoom": "never"}, {"zoom": "always", "region_threshold": 0.4}):
        answer = QZoom(model).ask(PAGE, "What is the total?", max_new_tokens=6, **options)
        out.append((answer.tokens, [region.box for region in answer.regions]))
    return out


@pytest.mark.parametrize("tower", ["folder", "inside"])
def test_the_authors_layout_loads(tower, tmp_path):
    made = engine()
    folder = released(made, tmp_path, tower=tower)
    loaded = load_engine(folder, dtype="float32")
    assert sizes_of(folder).layers == tiny_models.LAYERS
    assert loaded.config.replace(provenance={}) == made.config
    assert folders.same_branches(made, loaded)
    assert answers(loaded) == answers(made)


def test_there_and_back_keeps_names_settings_and_bits(tmp_path):
    made = engine()
    folder = released(made, tmp_path)
    report = convert(folder, tmp_path / "ours")
    assert (report.read_kind, report.written_kind) == ("upstream", "adapter")
    loaded = load_engine(tmp_path / "ours", dtype="float32")
    assert answers(loaded) == answers(made)
    assert loaded.backbone.image_token_id == ROWS
    convert(tmp_path / "ours", tmp_path / "back")
    assert folders.same_tensors(folders.all_tensors(folder), folders.all_tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_answer_only_is_a_model_of_transformers_own(tmp_path):
    made = engine()
    for source in (released(made, tmp_path), None):
        folder = source or tmp_path / "ours"
        convert(folder, tmp_path / f"plain-{folder.name}", answer_only=True)
        if source:
            convert(folder, tmp_path / "ours")
    for name in ("plain-model", "plain-ours"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == ROWS
        assert model.config.text_config.vocab_size % 64 == 0
        loaded = load_engine(tmp_path / name, dtype="float32")
        assert loaded.region is None
        assert answers(dataclasses.replace(loaded, region=made.region, config=made.config)) == answers(made)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert "USER: <image>\nWhat is the total? ASSISTANT:" in text


def test_half_a_model_is_one_sentence_and_is_filled_from_its_base(tmp_path):
    made = engine()
    half = released(made, tmp_path / "trained", layers=6)
    with refused("6 of 7 decoder layers", "half a model", "--base"):
        load_engine(half)
    base = save_pretrained(dataclasses.replace(made, region=None), tmp_path / "base", include_base=True)
    convert(half, tmp_path / "filled", base=str(base))
    assert answers(load_engine(tmp_path / "filled", dtype="float32")) == answers(made)
    convert(half, tmp_path / "plain", base=str(base), answer_only=True)
    assert answers(dataclasses.replace(load_engine(tmp_path / "plain", dtype="float32"), region=made.region,
                                       config=made.config)) == answers(made)  # fmt: skip


def test_released_models_load_by_their_hub_ids(cache, tmp_path):
    made, tower = engine(), "openai/clip-vit-large-patch14-336"
    seven, thirteen = upstream.UPSTREAM_BASES
    for repo_id, layers in ((seven, None), (thirteen, 6)):
        folder = released(made, tmp_path / repo_id, layers=layers)
        folders.edit_json(folder / "config.json", mm_vision_tower=tower)
        shutil.copytree(folder, cached(cache, repo_id))
    shutil.copytree(tmp_path / seven / "vision_tower", cached(cache, tower))
    save_pretrained(
        dataclasses.replace(made, region=None), cached(cache, upstream.base_of(thirteen)), include_base=True
    )
    for repo_id in (seven, thirteen):  # the second is half a model, filled from its base
        loaded = load_engine(repo_id, dtype="float32")
        assert answers(loaded) == answers(made)
        assert loaded.config.with_preset("characters").region_threshold == 0.05


def test_published_checkpoints_are_known_by_id_and_in_the_hubs_cache():
    for repo_id, base in upstream.UPSTREAM_BASES.items():
        assert upstream.base_of(repo_id) == upstream.base_of(f"/models/{repo_id.split('/')[1]}/") == base
        cached = f"/cache/models--{repo_id.replace('/', '--')}/snapshots/0123"
        assert upstream.base_of(cached) == base
    assert upstream.base_of("/models/other") is None


def test_a_tokenizer_that_needs_sentencepiece_is_one_sentence(tmp_path, monkeypatch):
    folder = released(engine(), tmp_path)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setattr("qzoom.checkpoints.base.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_engine(folder)


def test_a_missing_tower_is_one_sentence(tmp_path):
    folder = released(engine(), tmp_path)
    (tmp_path / "vision_tower" / "model.safetensors").unlink()
    (tmp_path / "vision_tower" / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=r"leaves its vision tower to mm_vision_tower.*pickled.*--base"):
        load_engine(folder)


def test_ours_on_transformers_layout_becomes_the_authors(tmp_path):
    made = dataclasses.replace(engine(), gate=tiny_models.engine("llava").gate)
    ours = save_pretrained(made, tmp_path / "ours", include_base=True, compact=False)
    convert(ours, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (settings["model_type"], settings["twig_K"], settings["enable_high_res"]) == ("llava_llama", 3, True)
    stored = folders.all_tensors(tmp_path / "merged")
    assert torch.equal(stored["twig_head.weight"], stored["lm_head.weight"])
    assert made.region is not None
    assert torch.equal(stored["model.twig_norm.weight"], made.region.norm.weight)
    folders.edit_json(tmp_path / "merged" / "config.json", mm_vision_tower="../vision_tower")
    (tmp_path / "vision_tower").mkdir()
    made.backbone.model.config.vision_config.to_json_file(tmp_path / "vision_tower" / "config.json")
    loaded = load_engine(tmp_path / "merged", dtype="float32")
    assert folders.same_branches(made, loaded)
    assert answers(loaded) == answers(made)
