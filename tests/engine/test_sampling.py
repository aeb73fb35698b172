from collections import Counter

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from qzoom.engine.sampling import penalised
from qzoom.errors import ConfigError
from qzoom.model import QZoom
from tests import tiny_models
from tests.plain import plain_generate, plain_inputs

PAGE = [tiny_models.picture(21, 200, 150)]
QUESTION = "What is the total?"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("more", [{}, {"temperature": 1.3, "seed": 2, "presence_penalty": 1.0}])
def test_log_probabilities_are_those_of_transformers(family, more):
    model = QZoom(tiny_models.engine(family))
    answer = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=12, logprobs=5, **more)
    if not more:
        tokens, logits = plain_generate(model.engine.backbone, PAGE, QUESTION, 12)
        assert [item.token for item in answer.logprobs] == tokens
    else:  # of drawn tokens: one forward pass over prompt and answer
        inputs = plain_inputs(model.engine.backbone, PAGE, QUESTION)
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer.tokens])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.engine.backbone.image_token_id).long()
        with torch.inference_mode():
            logits = model.engine.backbone.model(**inputs).logits[0, prompt - 1 : -1].float()
    assert len(answer.logprobs) == 12
    for item, row in zip(answer.logprobs, logits.log_softmax(-1), strict=True):
        assert item.logprob == pytest.approx(float(row[item.token]), abs=1e-4)
        assert [value for _, value in item.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in item.top] == pytest.approx([v for _, v in item.top], abs=1e-4)


def test_the_end_token_has_no_log_probability():
    made = tiny_models.build_engine("qwen3_vl")
    free, _ = plain_generate(made.backbone, PAGE, "When?", 8)
    made.backbone.model.generation_config.eos_token_id = [free[3]]
    answer = QZoom(made).ask(PAGE, "When?", zoom="never", max_new_tokens=8, logprobs=0)
    end = free.index(free[3])
    assert [item.token for item in answer.logprobs] == free[:end] == list(answer.tokens[:-1])
    assert all(item.top == () for item in answer.logprobs)
    assert QZoom(made).ask(PAGE, "When?", zoom="never", max_new_tokens=8).logprobs == ()


class OpenAIsRule(LogitsProcessor):
    """Presence and frequency penalties, token by token."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids, scores):
        out = scores.clone()
        for token, times in Counter(input_ids[0, self.prompt :].tolist()).items():
            out[0, token] -= self.presence + self.frequency * times
        return out


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (0.5, 0.25), (-0.3, -0.2)])
def test_penalties_are_openais(presence, frequency):
    model = QZoom(tiny_models.engine("qwen3_vl"))
    inputs = plain_inputs(model.engine.backbone, PAGE, QUESTION)
    prompt = inputs["input_ids"].shape[1]
    rule = LogitsProcessorList([OpenAIsRule(prompt, presence, frequency)])
    expected = model.engine.backbone.model.generate(
        **inputs, max_new_tokens=24, do_sample=False, logits_processor=rule
    )[0, prompt:].tolist()
    options = {"presence_penalty": presence, "frequency_penalty": frequency}
    answer = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=24, **options)
    assert list(answer.tokens) == expected


def test_penalties_leave_the_logits_alone():
    logits = torch.zeros(5)
    assert penalised(logits, {}, 1.0, 1.0) is logits
    assert penalised(logits, {2: 3}, 0.5, 0.25).tolist() == [0, 0, -1.25, 0, 0]
    assert logits.tolist() == [0] * 5


@pytest.mark.parametrize("bad", [{"presence_penalty": 3}, {"frequency_penalty": float("nan")}, {"logprobs": 21}])
def test_impossible_values_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        QZoom(tiny_models.engine("qwen3_vl")).make_options(**bad)
