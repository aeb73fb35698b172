"""A training run for the kill test: says each step, until it is done or killed."""

import sys
from pathlib import Path

from qzoom.training.stages import load_stage_recipe
from qzoom.training.train_stage import train_stage

if __name__ == "__main__":
    recipe = load_stage_recipe(Path(sys.argv[1]), "regions")
    train_stage(recipe, Path(sys.argv[2]), on_step=lambda facts: print(facts.step, flush=True))
