import torch

from qzoom.config import TokenBudget
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.prompt import build_prompt
from qzoom.training.samples import conversation_ids
from qzoom.training.stages import StageRecipe
from qzoom.training.tasks import GateTask
from tests.tiny_models import engine, picture


def task_of(world, made, cache_gb):
    return GateTask(StageRecipe("gate", "x", (str(world / "gate"),), cache_gb=cache_gb), made)


def prompts_of(made):
    ids, _ = conversation_ids(ChatEncoder(made.backbone), [("What?", "")])
    return [
        build_prompt(made.backbone, ids, made.backbone.encode([picture(i, 150 + 40 * i)], [TokenBudget(4, 20)]))
        for i in range(3)
    ]


def test_kept_states_are_those_computed_in_a_batch_and_are_made_once(world):
    made = engine("qwen3_vl")
    prompts = prompts_of(made)
    asked = []

    def make(index):
        asked.append(index)
        return prompts[index]

    plain, expected = task_of(world, made, 0.0).shared_states(made, "abc", make)
    task = task_of(world, made, 0.1)
    for _ in range(2):
        lean, found = task.shared_states(made, "abc", make)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
    assert asked == [0, 1, 2, 0, 1, 2]
    for short, whole in zip(lean, prompts, strict=True):
        assert (short.spans[0].start, short.spans[0].stop) == (whole.spans[0].start, whole.spans[0].stop)
        assert short.spans[0].features.grid == whole.spans[0].features.grid
        assert short.spans[0].features.tokens.numel() == 0
        assert torch.equal(short.positions, whole.positions)
    assert [len(p) for p in plain] == [len(p) for p in prompts]


def test_what_does_not_fit_is_made_again(world):
    made = engine("qwen3_vl")
    prompts = prompts_of(made)
    size = prompts[0].ids.numel() * (made.backbone.hidden_size * 4 + 32)
    task = task_of(world, made, 1.2 * size / 1e9)
    calls = []
    for _ in range(2):
        _, found = task.shared_states(made, [0, 1], lambda i: calls.append(i) or prompts[i])
        assert [len(hidden) for hidden in found] == [len(prompts[0]), len(prompts[1])]
    assert calls == [0, 1, 1]
