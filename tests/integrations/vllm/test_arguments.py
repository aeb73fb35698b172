import dataclasses
import json
import subprocess

import pytest

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.convert import convert
from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.load import checkpoint_identity, load_engine
from qzoom.cli.main import run
from qzoom.errors import CheckpointError, ConfigError
from qzoom.integrations.vllm import version_warning
from qzoom.integrations.vllm.arguments import command_line, engine_arguments
from tests import tiny_models
from tests.checkpoints.folders import copy, edit_json, engine, write_merged, write_plain
from tests.tiny_models import FAMILIES


def test_a_shell_may_split_what_is_printed(capsys):
    assert run(["vllm-args", "tiny", "--visual-tokens", "100", "--pictures", "3"]) == 0
    printed = capsys.readouterr().out
    split = subprocess.run(
        ["bash", "-c", 'printf "%s\\n" $1', "-", printed], capture_output=True, text=True, check=True
    )
    words = split.stdout.splitlines()
    assert words == printed.split()
    options = dict(zip(words[1::2], words[2::2], strict=False))
    folder = str(find_source("tiny").folder.resolve())
    assert words[0] == folder
    assert json.loads(options["--hf-overrides"])["qzoom_checkpoint"] == folder
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 4, "video": 0}
    assert json.loads(options["--mm-processor-kwargs"]) == {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 100 * 32 * 32}
    }
    # Consumers may take embeddings from clients; a producer does not.
    assert json.loads(options["--kv-transfer-config"])["kv_role"] == "kv_producer"
    assert options["--generation-config"] == "vllm"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_kind_of_checkpoint(family, tmp_path):
    made = engine(family)
    merged = write_merged(made, tmp_path / "merged", reuse_src_pos=False)
    convert(merged, tmp_path / "adapter")
    plain = write_plain(made, tmp_path / "plain")
    for folder in (merged, tmp_path / "adapter", plain):
        found = engine_arguments(str(folder))
        assert found["hf_overrides"]["architectures"][0].startswith("QZoomQwen")
        assert found["hf_overrides"]["qzoom_checkpoint"] == str(folder)
    identities = [checkpoint_identity(find_source(folder)) for folder in (merged, tmp_path / "adapter", plain)]
    assert len({one["base"] for one in identities}) == 1
    assert identities[2]["heads"] == ""
    assert all(one["heads"] for one in identities[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_without_base_weights_has_everything_else(family, tmp_path):
    folder = write_merged(engine(family), tmp_path / "merged")
    whole, light = load_engine(folder), load_engine(folder, dtype="float32", base_weights=False)
    assert all(weight.is_meta for weight in light.backbone.model.parameters())
    assert light.backbone.eos_ids == whole.backbone.eos_ids
    assert light.config == whole.config
    for part in ("gate", "region"):
        own, full = getattr(light, part).state_dict(), getattr(whole, part).state_dict()
        assert own.keys() == full.keys()
        assert all((own[name] == full[name]).all() for name in own)


def test_what_vllm_cannot_serve_is_refused(tmp_path):
    made = engine(FAMILIES[0])
    aligned = write_merged(made, tmp_path / "aligned", reuse_src_pos=True)
    with pytest.raises(ConfigError, match=r"aligned positions .* use the native engine"):
        engine_arguments(str(aligned))
    llava = tiny_models.engine("llava")
    save_pretrained(llava, tmp_path / "masks", include_base=True)
    with pytest.raises(
        ConfigError, match=r"only some tokens of a crop \(box.too_many='mask'\).* use the native engine"
    ):
        engine_arguments(str(tmp_path / "masks"))
    whole = llava.config.replace(box=dataclasses.replace(llava.config.box, too_many="none"))
    save_pretrained(dataclasses.replace(llava, config=whole), tmp_path / "whole", include_base=True)
    sizes = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}  # its squares
    assert engine_arguments(str(tmp_path / "whole"))["mm_processor_kwargs"] == sizes
    other = copy(write_plain(made, tmp_path / "plain"), tmp_path / "other")
    edit_json(other / "config.json", architectures=["Other"])
    with pytest.raises(CheckpointError, match="is a Other, and the plug-in for vLLM knows"):
        engine_arguments(str(other))
    adapter = copy(find_source("tiny").folder, tmp_path / "lora")
    edit_json(adapter / "qzoom_config.json", format_version=2, lora_base_weights="0" * 16)
    for load in (engine_arguments, lambda name: load_engine(name, base_weights=False)):
        with pytest.raises(CheckpointError, match="write a merged checkpoint with `qzoom convert"):
            load(str(adapter))
    with pytest.raises(ConfigError, match="has white space"):
        command_line({"model": "my models/one"})


def test_untested_versions_are_named():
    assert version_warning("0.32.1") == version_warning("0.28.0") == ""
    assert "was tested with vLLM 0.28 and 0.32, and this is 0.33.0" in version_warning("0.33.0")
