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


def test_one_model_has_no_mean(tmp_path):
    with pytest.raises(CheckpointError, match="at least two"):
        average_models([_model(tmp_path / "0", [1.0])], tmp_path / "mean")
