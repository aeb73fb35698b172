import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qzoom.errors import CheckpointError
from tiny.model import average_models
from tiny.train import app


def _model(folder, values, name="a.weight"):
    folder.mkdir()
    save_file({name: torch.tensor(values, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_mean_keeps_the_format_and_the_first_models_files(tmp_path):
    folders = [_model(tmp_path / str(i), values) for i, values in enumerate([[1.0, 4.0], [2.0, 0.0], [3.0, -1.0]])]
    result = CliRunner().invoke(app, ["average", *map(str, folders), "-o", str(tmp_path / "mean")])
    assert result.exit_code == 0
    weights = load_file(tmp_path / "mean" / "model.safetensors")
    assert weights["a.weight"].dtype == torch.bfloat16
    assert weights["a.weight"].tolist() == [2.0, 1.0]
    assert json.loads((tmp_path / "mean" / "config.json").read_text()) == {"model_type": "qwen3_vl"}
    assert (tmp_path / "mean" / "tokenizer.json").is_file()
    assert "The mean of 3 models" in result.output


@pytest.mark.parametrize("other", [([1.0], "a.weight"), ([1.0, 2.0], "b.weight")])
def test_models_of_different_shape_are_refused(tmp_path, other):
    folders = [_model(tmp_path / "0", [1.0, 2.0]), _model(tmp_path / "1", *other)]
    with pytest.raises(CheckpointError, match=r"tensor \w\.weight differs"):
        average_models(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def _adapter(folder, values):
    folder.mkdir()
    save_file({"region.a": torch.tensor(values)}, folder / "qzoom.safetensors")
    (folder / "qzoom_config.json").write_text(json.dumps({"base": {"id": f"of-{folder.name}"}}))
    return folder


def test_the_branches_of_adapters_are_averaged(tmp_path):
    folders = [_adapter(tmp_path / "0", [1.0, 4.0]), _adapter(tmp_path / "1", [2.0, -1.0])]
    for _ in range(2):  # the second time over the first one's
        average_models(folders, tmp_path / "mean")
    assert load_file(tmp_path / "mean" / "qzoom.safetensors")["region.a"].tolist() == [1.5, 1.5]
    assert json.loads((tmp_path / "mean" / "qzoom_config.json").read_text()) == {"base": {"id": "of-0"}}
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == ["qzoom.safetensors", "qzoom_config.json"]


def test_adapters_with_their_bases_are_averaged_with_them(tmp_path):
    folders = [_adapter(tmp_path / str(i), [1.0 + i]) for i in range(2)]
    for number, folder in enumerate(folders):
        save_file({"a.weight": torch.tensor([3.0 * number])}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    average_models(folders, tmp_path / "mean")
    assert load_file(tmp_path / "mean" / "model.safetensors")["a.weight"].tolist() == [1.5]
    assert load_file(tmp_path / "mean" / "qzoom.safetensors")["region.a"].tolist() == [1.5]


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    adapter = _adapter(tmp_path / "0", [1.0])
    with pytest.raises(CheckpointError, match=r"has no qzoom\.safetensors"):
        average_models([adapter, _model(tmp_path / "1", [1.0])], tmp_path / "mean")
    (tmp_path / "2" / "lora").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has LoRA weights; merge them"):
        average_models([adapter, tmp_path / "2"], tmp_path / "mean")


def test_one_model_has_no_mean(tmp_path):
    with pytest.raises(CheckpointError, match="at least two"):
        average_models([_model(tmp_path / "0", [1.0])], tmp_path / "mean")
