"""Short trainings of the small model of `world`, and what they leave."""

import dataclasses

import torch
import yaml
from safetensors.torch import load_file

from qzoom.checkpoints.load import load_engine
from qzoom.training.stages import StageRecipe
from qzoom.training.train_stage import train_stage


def recipe_of(world, **changes):
    values = {
        "stage": "regions", "base": str(world / "base"), "labels": (str(world / "regions"),), "batch": 4,
        "micro_batch": 2, "steps": 4, "learning_rate": 3e-3, "precision": "float32", "save_steps": 1, "trackers": (),
        "gradient_checkpointing": False,
    }  # fmt: skip
    return StageRecipe(**values | changes)


def weights_in(folder):
    return load_file(folder / "model" / "qzoom.safetensors")


def run(recipe, folder, **options):
    return train_stage(recipe, folder, base=load_engine(recipe.base, dtype="float32"), **options)


ROUNDING = 3e-5
"""A hundredth of the learning rate: Adam divides by a gradient's size, so rounding may decide a step."""


def same(one, two, tolerance=0.0):
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=tolerance, rtol=0)


def written(recipe, path):
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}
    path.write_text(yaml.safe_dump(values))
    return path
