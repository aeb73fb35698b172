"""The mean of the weights of several models that were trained from the same weights on different images.

Such models lie in the same basin of the loss, so their mean is about as good as one model trained on all the images
("model soups", Wortsman et al. 2022), and the trainings can run independently.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from qzoom.checkpoints.weights import read_index, read_tensors
from qzoom.checkpoints.writing import atomic_folder, copy_side_files
from qzoom.errors import CheckpointError

__all__ = ["average_models"]


def average_models(folders: Sequence[Path], output: Path) -> None:
    """Write the mean of models to `output`, with the settings and the tokenizer of the first.

    Args:
        folders: two or more model folders with the same tensors; each counts alike. Means are taken in float32 and
            stored in the first model's number formats.
        output: new or empty folder, or an earlier model's.

    Raises:
        CheckpointError: fewer than two folders, a folder that cannot be read, other names or shapes of tensors.
    """
    import torch
    from safetensors.torch import save_file

    if len(folders) < 2:
        raise CheckpointError("A mean needs at least two model folders.")
    indexes = [read_index(folder) for folder in folders]
    shapes = [{name: info.shape for name, info in index.tensors.items()} for index in indexes]
    for folder, other in zip(folders[1:], shapes[1:], strict=True):
        different = sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name))
        if different:
            raise CheckpointError(
                f"{folder} is of another architecture than {folders[0]}: tensor {different[0]} differs; give models "
                "trained from the same start."
            )
    mean = {}
    for name in shapes[0]:
        parts = [read_tensors(index, [name])[name] for index in indexes]
        total = torch.stack([part.to(torch.float32) for part in parts]).mean(dim=0)
        mean[name] = total.to(parts[0].dtype).contiguous()
    with atomic_folder(output, "plain") as part:
        save_file(mean, part / "model.safetensors", metadata={"format": "pt"})
        (part / "model.safetensors").chmod(0o644)
        shutil.copyfile(folders[0] / "config.json", part / "config.json")
        copy_side_files(folders[0], part)
