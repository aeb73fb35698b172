import dataclasses
import json

import numpy as np
import pytest
import torch

from qzoom.config import TokenBudget
from qzoom.data.questions import read_receipt_questions, read_receipts
from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.coverage import (
    QuestionMaps,
    choose,
    choosing_half,
    compare_coverage,
    depth,
    lift,
    measure_coverage,
    pointing,
    question_maps,
    read_coverage,
    relative,
    scores,
)
from qzoom.evaluation.tables import plot_coverage
from qzoom.model import QZoom
from tests.evaluation.samples import receipt, write_split
from tests.tiny_models import engine


def test_relative_maps_by_hand():
    question, generic = np.array([[0.4, 0.1], [0.1, 0.1]]), np.array([[0.4, 0.1], [0.05, 0.1]])
    assert relative(question, generic, 0.0) == pytest.approx(np.array([[1, 1], [2, 1]]))
    generic = np.array([[0.0, 0.4]])
    found = relative(np.array([[0.1, 0.2]]), generic, 0.5)
    assert found == pytest.approx(np.array([[0.1 / 0.1, 0.2 / 0.5]]))
    assert np.isfinite(relative(np.ones((1, 2)), np.zeros((1, 2)), 0.0)).all()


def test_lift_pointing_and_depth():
    covered = np.array([[0.5, 0], [0, 0]])
    assert lift(np.ones((2, 2)), covered) == pytest.approx(1.0)  # even attention is chance
    assert lift(np.array([[1.0, 0], [0, 0]]), covered) == pytest.approx(0.5 / 0.125)
    assert lift(np.array([[0, 1.0], [0, 0]]), covered) == 0.0
    assert lift(np.zeros((2, 2)), covered) == 0.0
    stacked = lift(np.stack([np.ones((2, 2)), np.zeros((2, 2))]), covered)
    assert stacked == pytest.approx([1.0, 0.0])
    covered = np.array([[0.01, 0], [0, 0]])
    assert pointing(np.array([[3.0, 2], [1, 0]]), covered) == 1.0
    assert pointing(np.array([[1.0, 2], [1, 0]]), covered) == 0.0
    assert (depth(23, 36), depth(35, 36)) == (24 / 36, 1.0)


def test_scores_of_heads_and_their_mean():
    question = np.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # one layer, two heads, one row of two cells
    generic = np.full_like(question, 0.5)
    found = scores(question, generic, np.array([[1.0, 0.0]]))
    assert found.shape == (2, 2, 1, 3)
    assert found[0, 0, 0] == pytest.approx([2.0, 0.0, 1.0])
    assert found[1, 0, 0] == pytest.approx([2.0, 0.0, 1.0])
    assert found[0, 1, 0] == pytest.approx([1.0, 0.0, 1.0])


PICTURES = ["a", "a", "b", "c", "d"]


def test_pictures_stay_together():
    half = choosing_half(PICTURES)
    assert half[0] == half[1]
    names = {name for name, chosen in zip(PICTURES, half, strict=True) if chosen}
    assert len(names) == 2
    assert (choosing_half(PICTURES[::-1])[::-1] == half).all()
    with pytest.raises(DataError, match="two pictures"):
        choosing_half(["a", "a"])


def test_the_other_half_reports():
    half = choosing_half(PICTURES)
    values = np.ones((5, 2, 2, 3))  # questions, figures, layers, heads + mean
    values[half, 0, 1, 0] = 9.0  # looks good where it is chosen
    values[~half, 0, 1, 0] = 0.5  # and is not
    values[~half, 0, 0, 1] = 99.0
    found = choose(values, PICTURES, of_heads=True)
    assert (found["layer"], found["head"], found["depth"]) == (1, 0, 1.0)
    assert (found["lift"], found["lift_when_chosen"], found["lift_interval"]) == (0.5, 9.0, (0.5, 0.5))
    assert found["hit"] == 1.0
    values[half, 0, 0, 2] = 3.0
    values[~half, 0, 0, 2] = 2.0
    layer = choose(values, PICTURES, of_heads=False)
    assert [layer[name] for name in ("layer", "head", "lift", "lift_when_chosen")] == [0, None, 2.0, 3.0]


def maps(picture, index=0, *, looks_at=(0, 0), kind="code", box=(0, 0, 20, 20)):
    """Three layers of two heads on 2 x 2 cells of 20 px: layer 1 puts three quarters of its attention on one cell."""
    even = np.full((3, 2, 2, 2), 0.1)
    own = even.copy()
    own[1] = 0.1 / 3
    own[(1, slice(None), *looks_at)] = 0.3
    return QuestionMaps(picture, index, kind, (box,), (40, 40), own, even)


def test_figures_by_hand_and_questions_without_maps():
    found = measure_coverage([maps("a"), maps("b"), maps("b", 1, kind="date"), maps("c")])
    assert (found.n, found.pictures, found.errors, found.area, found.chance_hit) == (4, 3, 0, 0.25, 0.25)
    for measure in ("relative", "raw"):
        chosen = found.measures[measure]["layer"]
        assert (chosen["layer"], chosen["depth"], chosen["hit"]) == (1, 2 / 3, 1.0)
        assert chosen["lift"] == pytest.approx(0.75 / 0.25)
        assert found.measures[measure]["lift"] == pytest.approx([1.0, 3.0, 1.0])
    assert sum(kind["n"] for kind in found.per_kind.values()) == found.reported
    assert (len(found.rows), found.rows[0]["layer_lift"]) == (4, pytest.approx(3.0))
    lost = dataclasses.replace(maps("d"), error="It is broken.", question=np.zeros(0), generic=np.zeros(0))
    outside = maps("e", box=(50, 50, 60, 60))
    found = measure_coverage([maps("a"), lost, maps("b"), outside])
    assert (found.n, found.errors) == (2, 2)
    with pytest.raises(DataError, match=r"It is broken\."):
        measure_coverage([lost])
    with pytest.raises(DataError, match="data with boxes"):
        measure_coverage([])


def test_before_and_after(tmp_path):
    names = [f"p{i}" for i in range(6)]
    before = measure_coverage([maps(name, looks_at=(1, 1)) for name in names])
    after = measure_coverage([maps(name) for name in names])
    (tmp_path / "coverage.json").write_text(json.dumps(before.to_dict()), encoding="utf-8")
    found = compare_coverage(after.to_dict(), read_coverage(tmp_path))
    assert found["n"] == before.reported == 3
    assert found["dropped"] == 0
    fewer = compare_coverage({"rows": after.rows[:-1]}, before.to_dict())
    assert (fewer["n"], fewer["dropped"]) == (3 - after.rows[-1]["reported"], int(after.rows[-1]["reported"]))
    assert found["layer_lift"]["this"] == pytest.approx(3.0)
    assert found["layer_lift"]["other"] == pytest.approx(1.0)  # the even layers were the best that it had
    assert found["layer_lift"]["interval"] == pytest.approx([2.0, 2.0])
    with pytest.raises(DataError, match="no question in common"):
        compare_coverage(after.to_dict(), measure_coverage([maps("x"), maps("y")]).to_dict())
    (tmp_path / "coverage.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="no figures"):
        read_coverage(tmp_path)
    with pytest.raises(DataError, match="no figures"):
        read_coverage(tmp_path / "nothing")


def test_the_plot_is_a_picture(tmp_path):
    from PIL import Image

    path = plot_coverage(measure_coverage([maps("a"), maps("b")]), tmp_path / "out" / "coverage.png")
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1440, 630))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_attention_is_that_of_the_stock_model(tmp_path, family):
    """All layers and heads against transformers' own eager attention over the same prompt."""
    from qzoom.engine.flow import coarse_pass
    from qzoom.engine.perceive import Stopwatch

    model = QZoom(engine(family, heads=False, attn="eager"), "random")
    record = receipt("a", 128, 160)
    record["questions"] = record["questions"][:1]
    task = read_receipt_questions(write_split(tmp_path, [record]), "dev")
    (found,) = list(question_maps(model, task, TokenBudget(4, 12)))
    assert (found.error, found.picture, found.index, found.kind) == (None, "a", 0, "total")
    request = model.request(task.sample(0).image, "What is the total?", zoom="never", coarse_tokens=(4, 12))
    prompt = coarse_pass(model.engine, [request], Stopwatch(torch.device("cpu")))[0].state.prompt
    stock, span = model.engine.backbone, prompt.spans[0]
    hidden = stock.embed(prompt.ids).clone()
    hidden[span.start : span.stop] = span.features.tokens
    deep = {}
    if span.features.deepstack:
        deep = {
            "visual_pos_masks": (prompt.ids == stock.image_token_id)[None],
            "deepstack_visual_embeds": list(span.features.deepstack),
        }
    with torch.inference_mode():
        out = stock.decoder(
            inputs_embeds=hidden[None], position_ids=prompt.positions[:, None], output_attentions=True,
            use_cache=False, **deep,
        )  # fmt: skip
    wanted = torch.stack([layer[0, :, -1, span.start : span.stop] for layer in out.attentions])
    shape = (*wanted.shape[:2], *span.features.grid)
    np.testing.assert_allclose(found.question, wanted.view(shape).double().numpy(), rtol=1e-4, atol=1e-7)
    assert not np.allclose(found.question, found.generic)


def test_hybrid_models_are_refused_before_anything_is_asked(tmp_path):
    task = read_receipts(write_split(tmp_path, [receipt("a")]), "dev")
    with pytest.raises(ConfigError, match="Measuring coverage needs full attention in every layer"):
        next(question_maps(QZoom(engine("qwen3_5", heads=False), "hybrid"), task, None))


def test_a_broken_picture_and_a_negative(tmp_path):
    negative = receipt("b", 90, 120)
    negative["questions"][0]["negative"] = True
    task = read_receipt_questions(write_split(tmp_path, [receipt("a", 96, 160), negative, receipt("c")]), "dev")
    task.sample(2).image.write_bytes(b"\x89PNG no more")
    found = list(question_maps(QZoom(engine("qwen3_vl"), "random"), task, TokenBudget(4, 12)))
    assert [(item.picture, item.kind) for item in found] == [
        ("a", "total"), ("a", "date"), ("b", "date"), ("c", "total"), ("c", "date"),
    ]  # fmt: skip
    assert [item.error is None for item in found] == [True, True, True, False, False]
    assert measure_coverage(found).errors == 2
