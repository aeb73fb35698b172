"""Take some training steps in this process, one of those that torchrun started, then go on from the state that they
left: RECIPE FOLDER STEPS STEPS..."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tiny.test_train import take_steps
from tiny.recipe import load_recipe

torch.set_num_threads(1)
for count in sys.argv[3:]:
    take_steps(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), int(count))
    dist.barrier()  # the first process has written the state
