import json

import pytest
import torch

from qzoom.data.overlay import ShareSchedule
from qzoom.errors import ConfigError
from qzoom.training.losses import IGNORE
from qzoom.training.student.attention import _LONG, _attend, check_supervision, layer_inputs, supervision_loss
from qzoom.training.student.collate import Collator, Prompter
from qzoom.training.student.data import read_split
from qzoom.training.student.recipe import AttentionSupervision, SftSettings
from qzoom.training.student.run import train_student
from qzoom.training.student.schedule import ScheduleEntry
from tests.tiny_models import engine
from tests.training.student.conftest import recipe_of

LAYER, HEADS = 1, (0, 2)


@pytest.fixture
def made(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine("qwen3_vl")
    recipe = recipe_of(tmp_path, data, clause=False, styles={"none": 1.0})
    rows = [ScheduleEntry((0, 1, 2), 0, 0.0, 12), ScheduleEntry((3,), 0, 0.0, 12)]
    collator = Collator(Prompter(student, recipe), split.train, rows, masked=True, regions=True)
    return student.backbone.model, collator, student.backbone.image_token_id


@pytest.mark.parametrize("length", [_LONG - 1, _LONG])
def test_short_and_long_sequences_are_computed_alike(length):
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~mask, -1e9)
    expected = scores.softmax(-1) @ value
    out = _attend(query, key, value, mask, 0.3)
    assert torch.allclose(out, expected, atol=1e-5)
    weights = torch.randn(out.shape, generator=generator)
    for found, wanted in zip(
        torch.autograd.grad((out * weights).sum(), (query, key, value)),
        torch.autograd.grad((expected * weights).sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(found, wanted, atol=1e-4)


def test_a_question_knows_the_visual_tokens_of_its_region(made):
    _, collator, mark = made
    batch = collator([{"row": 0}, {"row": 1}])
    assert batch["regions"].shape[:2] == (2, 3)
    (sequence,) = collator.sequences(ScheduleEntry((0,), 0, 0.0, 12))
    rows, columns = sequence.view.cells
    visual = (sequence.ids == mark).nonzero().squeeze(1)
    grid = sequence.regions[0, visual].view(rows, columns)
    inside = [[96 * r / rows < 48 and 96 * (r + 1) / rows > 16 for r in range(rows)]]
    across = torch.tensor([128 * c / columns < 48 and 128 * (c + 1) / columns > 16 for c in range(columns)])
    assert torch.equal(grid, torch.tensor(inside).T & across)
    assert sequence.regions.sum() == grid.sum() > 0
    assert not batch["regions"][1, 1:].any()


def test_the_loss_is_the_attention_on_the_region(made):
    model, collator, _ = made
    batch = collator([{"row": 0}, {"row": 1}])
    given = {name: batch.pop(name) for name in ("regions", "segment")}
    labels = batch.pop("labels")
    before = model.config.text_config._attn_implementation
    model.config.text_config._attn_implementation = "eager"
    mask = torch.where(batch["attention_mask"], 0.0, torch.finfo(torch.float32).min)
    layer = model.model.language_model.layers[LAYER]
    try:
        with layer_inputs(layer) as seen, torch.no_grad():
            found = model(**batch | {"attention_mask": mask}, output_attentions=True, use_cache=False)
            loss = supervision_loss(layer, seen, labels, given, HEADS)
    finally:
        model.config.text_config._attn_implementation = before
    wanted = 0.0
    for row, places in enumerate(labels):
        for place in (places != IGNORE).nonzero().squeeze(1).tolist():
            target = given["regions"][row, given["segment"][row, place - 1] - 1]
            shares = found.attentions[LAYER][row, list(HEADS), place - 1][:, target].sum(-1)
            wanted -= float(shares.log().mean())
    assert float(loss) == pytest.approx(wanted, rel=1e-4)
    assert not layer._forward_pre_hooks


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]


def run(student, data, folder, weight, micro_batch=2, steps=1, **changes):
    supervision = AttentionSupervision(weight, LAYER, HEADS)
    sft = SftSettings(3e-3, "constant", 0.0, 4, micro_batch, steps=steps)
    fade = ShareSchedule(0.0, 0.0, "constant")
    changes |= {"sft": sft, "attention_supervision": supervision, "fade": fade}
    train_student(recipe_of(student, data, **changes), folder)
    return losses(folder)


@pytest.fixture(scope="module")
def trained(student, data, tmp_path_factory):
    """Losses of five steps without and with supervision."""
    folder = tmp_path_factory.mktemp("supervised")
    plain = run(student, data, folder / "plain", 0.0, steps=5)
    return plain, run(student, data, folder / "supervised", 1.0, steps=5)


def test_training_adds_the_loss_once_however_a_batch_is_cut(student, data, trained, tmp_path):
    plain, once = (found[0] for found in trained)
    (plain_whole,) = run(student, data, tmp_path / "plain", 0.0, micro_batch=4)
    (half_whole,) = run(student, data, tmp_path / "half", 0.5, micro_batch=4)
    assert once > plain
    assert once - plain == pytest.approx(2 * (half_whole - plain_whole), rel=1e-3)


def test_heads_learn_to_look(trained):
    plain, found = trained
    assert found[-1] - plain[-1] < 0.8 * (found[0] - plain[0])


@pytest.mark.parametrize(
    ("family", "part", "words"),
    [
        ("qwen2_5_vl", AttentionSupervision(0.1), "not implemented for students of type qwen2_5_vl"),
        ("qwen3_vl", AttentionSupervision(0.1, 99), "layer 99 is outside"),
        ("qwen3_vl", AttentionSupervision(0.1, 0, (99,)), "head 99 is outside"),
    ],
)
def test_what_cannot_be_supervised_is_refused(family, part, words):
    with pytest.raises(ConfigError, match=words):
        check_supervision(engine(family).backbone, part)
    check_supervision(engine(family).backbone, AttentionSupervision(0.0, 99))


def test_heads_must_be_numbers():
    with pytest.raises(ConfigError, match="heads must be a list"):
        AttentionSupervision(heads=())
