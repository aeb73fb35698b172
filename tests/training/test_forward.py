import pytest
import torch

from qzoom.config import TokenBudget
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.perceive import region_logits
from qzoom.engine.prompt import build_prompt
from qzoom.engine.state import State, advance_gate, advance_region, advance_shared
from qzoom.training.forward import hidden_states, region_logits_at, run_stack
from qzoom.training.samples import conversation_ids
from tests.tiny_models import FAMILIES, engine, picture

TURNS = [[("What is it?", "a cat"), ("Where?", "in the corner"), ("Why?", "")], [("Who is there, if anybody?", "")]]


def prompts_of(made):
    chat = ChatEncoder(made.backbone)
    out = []
    for number, turns in enumerate(TURNS):
        ids, asking = conversation_ids(chat, turns)
        features = made.backbone.encode([picture(number)], [TokenBudget(4, 20)])
        prompt = build_prompt(made.backbone, ids, features)
        out.append((prompt, [i + len(prompt) - len(ids) for i in asking]))
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_equals_the_engine(family, attn):
    made = engine(family, attn=attn)
    found = prompts_of(made)
    prompts = [prompt for prompt, _ in found]
    with torch.no_grad():
        states = advance_shared(made, [State.empty(made, prompt) for prompt in prompts])
        shared = hidden_states(made.backbone, prompts, made.config.shared_layers)
        for state, own in zip(states, shared, strict=True):
            torch.testing.assert_close(own, state.hidden, atol=2e-5, rtol=1e-4)
        positions = [prompt.positions for prompt in prompts]
        _, last = advance_gate(made, states)
        hidden = run_stack(made.backbone, list(made.gate.layers), shared, positions)
        for own, expected in zip(hidden, last, strict=True):
            torch.testing.assert_close(own[-1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_gets_the_map_of_its_own_prompt(family):
    made = engine(family)
    layers = list(made.region.layers)
    with torch.no_grad():
        for prompt, asking in prompts_of(made):
            (shared,) = hidden_states(made.backbone, [prompt], made.config.shared_layers)
            (hidden,) = run_stack(made.backbone, layers[:-1], [shared], [prompt.positions])
            maps = region_logits_at(made, hidden, prompt, asking)
            for query, values in zip(asking, maps, strict=True):
                cut = type(prompt)(prompt.ids[: query + 1], prompt.positions[:, : query + 1], prompt.spans)
                (state,) = advance_shared(made, [State.empty(made, cut)])
                (state,) = advance_region(made, [state])
                torch.testing.assert_close(values, region_logits(made, state)[0], atol=2e-5, rtol=1e-4)


def test_asking_tokens_end_each_turn_and_recomputing_changes_no_gradient():
    made = engine("qwen3_vl")
    ((prompt, _), _) = prompts_of(made)
    layer = made.gate.layers[0]
    gradients = []
    for recompute in (False, True):
        inputs = hidden_states(made.backbone, [prompt], 3)[0].detach().requires_grad_(True)
        (out,) = run_stack(made.backbone, [layer], [inputs], [prompt.positions], recompute=recompute)
        out.square().sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)
    made = engine("qwen3_vl")
    chat = ChatEncoder(made.backbone)
    ids, asking = conversation_ids(chat, TURNS[0])
    alone = conversation_ids(chat, TURNS[0][:1])
    assert asking[0] == alone[1][0]
    assert ids[: asking[0] + 1] == alone[0]
    assert asking[-1] == len(ids) - 1
    assert "in the corner" in made.backbone.tokenizer.decode(ids)
