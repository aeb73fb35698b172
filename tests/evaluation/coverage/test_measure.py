"""Coverage of maps made by hand and of a random model's attention."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from qzoom.config import TokenBudget
from qzoom.data.questions import read_receipt_questions
from qzoom.errors import DataError
from qzoom.evaluation.coverage import compare_coverage, measure_coverage, read_coverage
from qzoom.evaluation.coverage_maps import QuestionMaps, question_maps
from qzoom.evaluation.coverage_plot import plot_coverage
from qzoom.model import QZoom
from tests.evaluation.samples import receipt, write_split
from tests.tiny_models import engine


def maps(picture, index=0, *, looks_at=(0, 0), kind="code", box=(0, 0, 20, 20)):
    """Three layers of two heads on 2 x 2 cells of 20 px: layer 1 puts three quarters of its attention on one cell."""
    even = np.full((3, 2, 2, 2), 0.1)
    asked = even.copy()
    asked[1] = 0.1 / 3
    asked[(1, slice(None), *looks_at)] = 0.3
    return QuestionMaps(picture, index, kind, (box,), (40, 40), asked, even)


def test_figures_by_hand():
    found = measure_coverage([maps("a"), maps("b"), maps("b", 1, kind="date"), maps("c")], epsilon=0.0)
    assert (found.n, found.pictures, found.errors, found.area, found.chance_hit) == (4, 3, 0, 0.25, 0.25)
    for measure in ("relative", "raw"):
        chosen = found.measures[measure]["layer"]
        assert (chosen["layer"], chosen["depth"], chosen["hit"]) == (1, 2 / 3, 1.0)
        assert chosen["lift"] == pytest.approx(0.75 / 0.25)
        assert found.measures[measure]["lift"] == pytest.approx([1.0, 3.0, 1.0])
    # the release looks at two thirds of the depth, which is layer 1, and counts all four cells of this small grid
    assert (found.release["layer"], found.release["ratio"], found.release["chance"]) == (1, pytest.approx(1.0), 1.0)
    assert sum(kind["n"] for kind in found.per_kind.values()) == found.reported
    assert len(found.rows) == 4
    assert found.rows[0]["layer_lift"] == pytest.approx(3.0)


def test_questions_without_maps_are_counted():
    lost = dataclasses.replace(maps("d"), error="It is broken.", asked=np.zeros(0), generic=np.zeros(0))
    outside = maps("e", box=(50, 50, 60, 60))
    found = measure_coverage([maps("a"), lost, maps("b"), outside])
    assert (found.n, found.errors) == (2, 2)
    with pytest.raises(DataError, match=r"It is broken\."):
        measure_coverage([lost])
    with pytest.raises(DataError, match="data with boxes"):
        measure_coverage([])


def test_before_and_after(tmp_path):
    names = [f"p{i}" for i in range(6)]
    before = measure_coverage([maps(name, looks_at=(1, 1)) for name in names], epsilon=0.0)
    after = measure_coverage([maps(name) for name in names], epsilon=0.0)
    (tmp_path / "coverage.json").write_text(json.dumps(before.to_dict()), encoding="utf-8")
    found = compare_coverage(after.to_dict(), read_coverage(tmp_path))
    assert found["n"] == before.reported == 3
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
        assert image.format == "PNG"
        assert image.size == (1440, 630)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_attention_is_that_of_the_stock_model(tmp_path, family):
    """All layers and heads against transformers' own eager attention over the same prompt."""
    from qzoom.engine.generate import Stopwatch
    from qzoom.engine.perceive import look

    model = QZoom(engine(family, heads=False, attn="eager"), "random")
    record = receipt("a", 128, 160)
    record["questions"] = record["questions"][:1]
    task = read_receipt_questions(write_split(tmp_path, [record]), "dev")
    (found,) = list(question_maps(model, task, TokenBudget(4, 12)))
    assert (found.error, found.picture, found.index, found.kind) == (None, "a", 0, "total")
    request = model.request(task.samples[0].image, "What is the total?", zoom="never", coarse_tokens=(4, 12))
    prompt = look(model.engine, [request], Stopwatch(torch.device("cpu")))[0].state.prompt
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
            inputs_embeds=hidden[None],
            position_ids=prompt.positions[:, None],
            output_attentions=True,
            use_cache=False,
            **deep,
        )
    wanted = torch.stack([layer[0, :, -1, span.start : span.stop] for layer in out.attentions])
    shape = (*wanted.shape[:2], *span.features.grid)
    np.testing.assert_allclose(found.asked, wanted.view(shape).double().numpy(), rtol=1e-4, atol=1e-7)
    assert not np.allclose(found.asked, found.generic)


def test_a_broken_picture_and_a_negative(tmp_path):
    negative = receipt("b", 90, 120)
    negative["questions"][0]["negative"] = True
    task = read_receipt_questions(write_split(tmp_path, [receipt("a", 96, 160), negative, receipt("c")]), "dev")
    task.samples[2].image.write_bytes(b"\x89PNG no more")
    found = list(question_maps(QZoom(engine("qwen3_vl"), "random"), task, TokenBudget(4, 12)))
    assert [(item.picture, item.kind) for item in found] == [
        ("a", "total"),
        ("a", "date"),
        ("b", "date"),
        ("c", "total"),
        ("c", "date"),
    ]
    assert [item.error is None for item in found] == [True, True, True, False, False]
    assert measure_coverage(found).errors == 2
