import json

import pytest
import torch

from qzoom.checkpoints.load import load_engine
from qzoom.llm.settings import CallSettings, EndpointSettings
from qzoom.model import QZoom
from qzoom.scoring.judge import open_judge
from qzoom.training.run import TrainingRun
from qzoom.training.student.collate import Collator, Prompter
from qzoom.training.student.data import read_split
from qzoom.training.student.recipe import GrpoSettings
from qzoom.training.student.run import prepare_student, train_student
from qzoom.training.student.schedule import make_schedule
from qzoom.training.student.trainers import PromptProcessor, make_grpo_trainer, make_reward
from tests.llm.stub import nobody
from tests.tiny_models import engine
from tests.training.student.conftest import recipe_of


def part(**changes) -> GrpoSettings:
    values = {"learning_rate": 1e-3, "batch": 2, "micro_batch": 4, "group": 4, "steps": 2, "max_new_tokens": 3}
    return GrpoSettings(**(values | changes))


def log(folder):
    return [json.loads(line) for line in (folder / "grpo" / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def reader(student, data, tmp_path):
    """Rows of one question each about a student of its own."""
    recipe = recipe_of(student, data, method="grpo", grpo=part())
    split = read_split(data, tmp_path / "p", 0.0, 0)
    rows = make_schedule(split.train, steps=2, batch=2, most=1, tokens=(12,), negatives=None, rehearsal=0.0, seed=0)
    return recipe, Collator(Prompter(load_engine(student), recipe), split.train, rows)


def trainer_of(reader, tmp_path, reward=None):
    recipe, rows = reader
    model, weights = prepare_student(rows.prompter.engine, recipe)
    run = TrainingRun(rows.prompter.engine, recipe, tmp_path / "run")
    trainer = make_grpo_trainer(run, model, rows, 2)
    if reward is not None:
        trainer.reward_funcs = [reward]
    return trainer, weights


def test_two_steps_from_data_to_a_model(student, data, tmp_path):
    recipe = recipe_of(student, data, method="grpo", grpo=part(), rehearsal=0.25, validation_steps=1)
    report = train_student(recipe, tmp_path)
    found = log(tmp_path)
    assert [line["step"] for line in found if "reward" in line] == [1, 2]
    assert report.phases[0].steps == 2
    assert {v.step for v in report.validations} == {0, 1, 2}
    assert QZoom.from_pretrained(tmp_path / "model").has_region


def by_spread(completion_ids, **_):
    """A reward that differs inside every group."""
    return [float(index % 4) for index, _ in enumerate(completion_ids)]


def test_advantages_move_all_of_the_student(reader, tmp_path):
    trainer, weights = trainer_of(reader, tmp_path, by_spread)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    trainer.train()
    moved = [name for name, weight in weights.items() if not torch.equal(weight, before[name])]
    assert any("visual" in name for name in moved)
    assert any("language_model" in name for name in moved)
    history = [line for line in trainer.state.log_history if "reward_std" in line]
    assert len(history) == 2
    assert all(line["reward_std"] > 1.0 for line in history)


def test_replies_without_a_reward_have_no_gradient_and_no_say(reader, tmp_path):
    """Two of each group of four fail; the others' advantages are those of a group of two."""
    trainer, _ = trainer_of(reader, tmp_path, lambda completion_ids, **_: _holes(len(completion_ids)))
    trainer.model.train()
    made = trainer._generate_and_score_completions([{"row": i // 4, "prompt": _turn()} for i in range(8)])
    advantages = made["advantages"].view(2, 4)
    assert (advantages[:, 2:] == 0).all()
    spread = torch.tensor([1.0, 0.0]).std()
    torch.testing.assert_close(advantages[0, :2], torch.tensor([0.5, -0.5]) / (spread + 1e-4))


def test_a_step_without_any_reward_changes_nothing(reader, tmp_path):
    recipe, rows = reader
    object.__setattr__(recipe.grpo, "weight_decay", 0.0)
    trainer, weights = trainer_of((recipe, rows), tmp_path, lambda completion_ids, **_: [None] * len(completion_ids))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def _holes(count):
    return [(1.0, 0.0, None, None)[i % 4] for i in range(count)]


def _positions(rows, prompt):
    return rows.prompter.engine.backbone.positions(torch.tensor(prompt.ids), [prompt.view.cells])


def _turn():
    return [{"role": "user", "content": "."}]


def test_logits_of_the_trainer_equal_the_engines(reader, tmp_path):
    """Left-padded prompts of different lengths, scored by the trainer, against the engine's first token."""
    recipe, rows = reader
    trainer, _ = trainer_of(reader, tmp_path, by_spread)
    trainer.model.train()
    made = trainer._generate_and_score_completions([{"row": i // 4, "prompt": _turn()} for i in range(8)])
    keep = made["completion_ids"].shape[1]
    pictures = {k: made[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    with torch.no_grad():
        scores, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([made["prompt_ids"], made["completion_ids"]], 1),
            torch.cat([made["prompt_mask"], made["completion_mask"]], 1),
            keep,
            batch_size=4,
            **pictures,
        )
    for group in range(2):
        prompts = rows.prompt(group)
        assert made["prompt_ids"][4 * group][made["prompt_mask"][4 * group] == 1].tolist() == list(prompts.ids)
        with torch.no_grad():
            logits = rows.prompter.engine.backbone.model(
                input_ids=torch.tensor([prompts.ids]),
                position_ids=_positions(rows, prompts)[:, None],
                pixel_values=prompts.view.pixels,
                image_grid_thw=prompts.view.grid_thw,
                use_cache=False,
            ).logits[0, -1]
        first = made["completion_ids"][4 * group, 0]
        torch.testing.assert_close(scores[4 * group, 0], torch.log_softmax(logits, -1)[first], rtol=1e-3, atol=1e-3)


def test_a_judge_that_is_down_leaves_replies_unrewarded(reader):
    recipe, rows = reader
    free_rows = [i for i in range(4) if not rows.reference(i).answer.isdigit()]
    right = rows.reference(free_rows[0]).answer
    noted = {}
    with nobody() as url:
        judge = open_judge(EndpointSettings(url, "none"), CallSettings(retries=0))
        reward = make_reward(rows, recipe, judge.right)
        made = reward([_reply(right), _reply("a long guess")], row=free_rows[:1] * 2, log_metric=noted.__setitem__)
        judge.close()
    assert made == [1.0, None]
    assert (noted["accuracy"], noted["by_failed"], noted["well_formed"]) == (1.0, 0.5, 1.0)
    assert len(judge.reasons) == 1


def _reply(text):
    return [{"role": "assistant", "content": text}]


def test_processor_pads_on_the_left(reader):
    _, rows = reader
    backbone = engine("qwen3_vl").backbone
    made = PromptProcessor(backbone.image_processor, backbone.tokenizer, backbone.chat_template)
    prompts = [rows.prompt(0), rows.prompt(1)]
    out = made(images=[[one] for one in prompts])
    for index, one in enumerate(prompts):
        kinds = out["mm_token_type_ids"][index]
        assert int(kinds.sum()) == one.view.cells[0] * one.view.cells[1]
        assert kinds[-len(one.ids) :].tolist() == [int(token == one.image_token) for token in one.ids]
