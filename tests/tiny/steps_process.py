"""Take some training steps in this process, one of those that torchrun started: RECIPE FOLDER STEPS."""

import sys
from pathlib import Path

import torch

from tests.tiny.test_train import take_steps
from tiny.recipe import load_recipe

torch.set_num_threads(1)
take_steps(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
