import pytest
import torch

from qzoom.backbones.packed import PACKED
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.prompt import build_prompt
from qzoom.engine.request import Options, make_request
from qzoom.training.student.attention import packed_attention
from qzoom.training.student.collate import Collator, Prompter, pack_questions, pad_sequences
from qzoom.training.student.data import read_split
from qzoom.training.student.schedule import ScheduleEntry
from tests.tiny_models import engine
from tests.training.student.conftest import recipe_of


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def made(request, data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine(request.param)
    return student, split, Prompter(student, recipe_of(tmp_path, data, clause=False, styles={"none": 1.0}))


def test_prompt_equals_the_engines(made):
    student, split, prompter = made
    question = split.train[0]
    built = make_request(ChatEncoder(student.backbone), question.picture, question.text, Options(zoom="never"))
    features = student.backbone.encode([built.pictures[0].image], [prompter.budget_of(12)])
    wanted = build_prompt(student.backbone, built.ids, features)
    view = prompter.view(prompter.picture(question, "none", 12), 12)
    sequence = pack_questions(prompter, view, [prompter.tokenize(question.text, question.answer)])
    length = len(wanted.ids)
    assert torch.equal(sequence.ids[:length], wanted.ids)
    assert torch.equal(sequence.positions[:, :length], wanted.positions)
    reply = sequence.ids[length:]
    assert torch.equal(sequence.labels[length:], reply)
    assert (sequence.labels[:length] == -100).all()
    assert student.backbone.tokenizer.decode(reply) == f"{question.answer}<|im_end|>"
    assert torch.equal(sequence.positions[0, length:], wanted.next_position + torch.arange(len(reply)))


def test_logits_equal_the_engines_answer_path(made):
    student, split, prompter = made
    from qzoom.model import QZoom

    question = split.train[0]
    answer = QZoom(student).ask(question.picture, question.text, zoom="never", max_new_tokens=1, coarse_tokens=12)
    view = prompter.view(prompter.picture(question, "none", 12), 12)
    batch = pad_sequences([pack_questions(prompter, view, [prompter.tokenize(question.text, "x")])], 0)
    at = int((batch["labels"][0] != -100).nonzero()[0]) - 1
    batch.pop("labels")
    with torch.no_grad():
        logits = student.backbone.model(**batch, use_cache=False).logits[0, at]
    assert answer.tokens == (int(logits.argmax()),)


def test_packed_questions_are_as_if_alone(made):
    student, split, prompter = made
    questions = [q for q in split.train if q.picture == split.train[0].picture]
    assert len(questions) == 3
    view = prompter.view(prompter.picture(questions[0], "none", 12), 12)
    asked = [prompter.tokenize(q.text, q.answer) for q in questions]
    packed = pad_sequences([pack_questions(prompter, view, asked)], 0)
    assert packed["attention_mask"].shape == (1, 1, packed["input_ids"].shape[1], packed["input_ids"].shape[1])
    with torch.no_grad():
        together = _scores(student, packed)
        alone = torch.cat([_scores(student, pad_sequences([pack_questions(prompter, view, [a])], 0)) for a in asked])
    assert together.shape == alone.shape
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_plain_attention_gives_the_same_loss_and_leaves_the_model_as_it_was(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine("qwen3_vl")
    prompter = Prompter(student, recipe_of(tmp_path, data))
    view = prompter.view(prompter.picture(split.train[0], "none", 12), 12)
    asked = [prompter.tokenize(q.text, q.answer) for q in split.train[:3]]
    for some in (asked, asked[:1]):
        batch = pad_sequences([pack_questions(prompter, view, some)], 0, masked=True)
        assert batch["attention_mask"].ndim == 4
        with torch.no_grad():
            stock = _scores(student, batch)
            with packed_attention(student.backbone.model, batch, enabled=True):
                assert student.backbone.text_config._attn_implementation != PACKED
                plain = _scores(student, batch)
        torch.testing.assert_close(plain, stock, rtol=1e-4, atol=1e-4)
    config = student.backbone.model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == (PACKED, "sdpa")


def _scores(student, batch):
    """Log-probabilities of the labels, in order."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = student.backbone.model(**batch, use_cache=False).logits
    found = torch.log_softmax(logits[:, :-1].float(), -1)
    wanted = labels[:, 1:]
    return found[wanted != -100].gather(1, wanted[wanted != -100][:, None])[:, 0]


def test_marked_questions_get_a_picture_of_their_own(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine("qwen3_vl")
    recipe = recipe_of(tmp_path, data, styles={"rectangle": 1.0})
    rows = [ScheduleEntry((0, 1, 2), 0, 0.0, 12)]
    collator = Collator(Prompter(student, recipe), split.train, rows)
    sequences = collator.sequences(rows[0])
    assert len(sequences) == 3
    plain = Collator(Prompter(student, recipe_of(tmp_path, data, styles={"none": 1.0})), split.train, rows)
    (unmarked,) = plain.sequences(rows[0])
    assert not torch.equal(sequences[0].view.pixels, unmarked.view.pixels)
    text = student.backbone.tokenizer.decode(sequences[0].ids)
    assert "inside the drawn rectangle" in text
    batch = collator([{"row": 0}])
    assert batch["input_ids"].shape[0] == 3
    assert batch["attention_mask"].ndim == 2


def test_resized_pictures_from_memory_are_the_same(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine("qwen3_vl")
    plain = Prompter(student, recipe_of(tmp_path, data))
    kept = Prompter(student, recipe_of(tmp_path, data, cache_gb=0.001))
    for question in split.train[:6]:
        for _ in range(2):
            a = plain.view(plain.picture(question, "none", 8), 8)
            b = kept.view(kept.picture(question, "none", 8), 8)
            assert torch.equal(a.pixels, b.pixels)
            assert a.cells == b.cells
