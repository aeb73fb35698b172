import pytest
import torch

from qzoom.backbones.registry import backbone_class
from qzoom.engine.attention import ResponseAttention
from qzoom.errors import ConfigError
from qzoom.labels.find_heads import HeadSet, choose_heads, find_heads, published_heads, rank_heads
from qzoom.labels.settings import HeadSearch, RegionRecipe, parse_heads
from tests.tiny_models import build_engine


@pytest.mark.parametrize("text", ["", "22", "22:", "a:1", "22:1;4", "22:-1"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="LAYER:HEAD"):
        parse_heads(text)


def test_heads_are_ranked_by_where_they_point():
    inside = torch.tensor([[True, False], [False, False]])
    points = torch.tensor([[0.6, 0.1], [0.1, 0.1]])
    spread = torch.full((2, 2), 0.2)
    astray = torch.tensor([[0.1, 0.7], [0.1, 0.1]])
    attention = ResponseAttention(torch.stack([torch.stack([astray, points]), torch.stack([spread, astray])]), (3, 5))
    ranked = rank_heads([(attention, inside), (attention, inside)])
    assert (ranked[0].layer, ranked[0].head) == (3, 1)
    assert ranked[0].hit == 1.0
    assert ranked[0].lift == pytest.approx(0.6 / 0.9 / 0.25)
    assert ranked[-1].hit == 0.0
    with pytest.raises(ValueError, match="without samples"):
        rank_heads([])


def test_heads_are_found_on_synthetic_pictures():
    engine = build_engine("qwen3_vl", heads=False)
    recipe = RegionRecipe(tokens=30, max_new_tokens=3, search=HeadSearch(pictures=2, questions=2, count=3))
    scores, samples = find_heads(engine, "text", recipe)
    assert samples >= 2
    assert len(scores) == 3
    assert scores[0].hit >= scores[1].hit >= scores[2].hit
    assert find_heads(engine, "text", recipe) == (scores, samples)
    heads, facts = choose_heads(engine, ["text"], recipe)
    assert heads["text"].pointing == tuple((score.layer, score.head) for score in scores)
    assert facts["text"]["samples"] == samples


def test_heads_are_chosen_as_named_or_by_the_tables():
    engine = build_engine("qwen3_vl", heads=False)
    chosen, _ = choose_heads(engine, ["text"], RegionRecipe(heads="1:2 3:0", sink_heads="2:3"))
    assert chosen == {"text": HeadSet(((1, 2), (3, 0)), ((2, 3),))}
    with pytest.raises(ConfigError, match="Head 9:0 does not exist; the model has 7 layers of 4 heads"):
        choose_heads(engine, ["text"], RegionRecipe(heads="9:0"))
    with pytest.raises(ConfigError, match="no table of heads"):
        choose_heads(engine, ["text"], RegionRecipe(heads="preset"))
    seven = published_heads(backbone_class("qwen2_5_vl"), 3584, 28, "text")
    assert seven == HeadSet(((22, 1), (22, 4), (23, 6), (23, 11)))
    four = published_heads(backbone_class("qwen3_vl"), 2560, 36, "natural")
    assert four == HeadSet(((20, 15), (20, 21), (20, 23), (21, 8), (21, 10), (21, 11)), ((20, 1), (20, 24)))
    assert published_heads(backbone_class("qwen3_vl"), 64, 7, "text") is None
    assert parse_heads("22:1,4 23:6") == ((22, 1), (22, 4), (23, 6))
    assert parse_heads("1:2 1:2") == ((1, 2),)
