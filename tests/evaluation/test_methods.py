import dataclasses
import math

import numpy as np
import pytest
import torch

from qzoom.config import TokenBudget
from qzoom.data.samples import SampleQuestion
from qzoom.engine.request import Options
from qzoom.errors import ConfigError, HeadsMissingError
from qzoom.evaluation.methods import METHODS
from qzoom.evaluation.methods.agentic import ask_for_box, read_box
from qzoom.evaluation.methods.attention import GENERIC, best_window
from qzoom.evaluation.methods.base import with_needed_branches
from qzoom.evaluation.methods.confidence import entropy_doubt, margin_doubt
from qzoom.evaluation.methods.fixed import centre_box, random_box, read_fixed_box
from qzoom.images.geometry import contains
from qzoom.model import QZoom
from qzoom.types import SamplingParams
from tests import tiny_models
from tests.evaluation.samples import model
from tests.tiny_models import picture

COARSE, REGION = TokenBudget(4, 12), TokenBudget(4, 9)
OPTIONS = Options(
    coarse_tokens=COARSE, region_tokens=REGION, sampling=SamplingParams(max_new_tokens=4), region_threshold=0.5
)
PICTURE = picture(3, 260, 180)
ASKED = SampleQuestion("total", "What is the total?", "33.90", ((100, 60, 140, 80),))
LIMITS = {"coarse_tokens": COARSE, "region_tokens": REGION, "max_new_tokens": 4, "region_threshold": 0.5}


def ask(name, reader, images, question, options):
    return METHODS[name].answer(reader, images, question, options)[0]


def answered(name, reader, options=OPTIONS):
    return METHODS[name].answer(reader, PICTURE, ASKED, options)


@pytest.mark.parametrize("name", METHODS)
def test_a_session_changes_nothing_but_the_cost(name):
    """The same answer fresh and on a shared coarse view, within the budget."""
    asked = model()
    fresh = ask(name, asked, PICTURE, ASKED, OPTIONS)
    shared = ask(name, asked, asked.session(PICTURE, coarse_tokens=COARSE), ASKED, OPTIONS)
    assert (fresh.text, fresh.gate.zoomed) == (shared.text, shared.gate.zoomed)
    assert [(r.box, r.tokens) for r in fresh.regions] == [(r.box, r.tokens) for r in shared.regions]
    assert fresh.usage.coarse_tokens <= 12
    assert fresh.usage.region_tokens == sum(region.tokens for region in fresh.regions) <= 9
    assert fresh.gate.zoomed == bool(fresh.regions)
    assert fresh.usage.completion_tokens <= 4


def test_the_models_own_ways_are_its_own():
    asked = model()
    for name, zoom in (("qzoom", "auto"), ("plain", "never"), ("always", "always")):
        said = ask(name, asked, PICTURE, ASKED, OPTIONS)
        alone = asked.ask(PICTURE, ASKED.question, zoom=zoom, **LIMITS)
        assert (said.text, said.regions, said.usage) == (alone.text, alone.regions, alone.usage)
    never = ask("qzoom", asked, PICTURE, ASKED, dataclasses.replace(OPTIONS, zoom="never"))
    assert never.regions == ()
    assert {name for name, method in METHODS.items() if not method.zooms} == {"plain"}
    assert {name for name, method in METHODS.items() if method.needs_region} == {"qzoom", "always", "margin", "entropy"}
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize(
    ("name", "zoom", "branches"),
    [
        ("plain", "never", ()), ("qzoom", "never", ()), ("centre", "always", ()), ("random", "always", ()),
        ("oracle", "always", ()), ("attention", "always", ()), ("agentic", "always", ()),
        ("always", "always", ("region",)), ("margin", "always", ("region",)), ("entropy", "always", ("region",)),
        ("qzoom", "always", ("region",)), ("qzoom", "auto", ("gate", "region")),
    ],
)  # fmt: skip
def test_a_session_runs_the_branches_that_a_method_uses_and_no_others(name, zoom, branches):
    """A shared look of the plain model costs what its user pays, and says what it says with branches beside it."""
    asked = model()
    lean = with_needed_branches(asked, METHODS[name], zoom)
    session = lean.session(PICTURE, coarse_tokens=COARSE)
    read = session.prefix.shared.length
    assert read > 0
    assert session.prefix.upper.length == read
    for branch in ("gate", "region"):
        assert getattr(session.prefix, branch).length == (read if branch in branches else 0)
    assert bool(session.prefix.keys) == ("region" in branches)
    budget = dataclasses.replace(OPTIONS, zoom=zoom)
    whole = ask(name, asked, asked.session(PICTURE, coarse_tokens=COARSE), ASKED, budget)
    said = ask(name, lean, session, ASKED, budget)
    assert (said.text, said.gate, said.usage) == (whole.text, whole.gate, whole.usage)
    assert [region.box for region in said.regions] == [region.box for region in whole.regions]
    assert asked.has_gate
    assert asked.has_region


def test_without_branches_the_training_free_methods_still_look():
    bare = model(heads=False)
    for name in ("attention", "random", "centre", "oracle"):
        said = ask(name, bare, PICTURE, ASKED, OPTIONS)
        assert len(said.regions) == 1
        assert 0 < said.regions[0].tokens <= 9
    for name in ("margin", "entropy", "always"):
        with pytest.raises(HeadsMissingError):
            ask(name, bare, PICTURE, ASKED, OPTIONS)


def test_the_oracle_holds_the_place_and_reads_it_as_the_engine_does():
    """Insertion and prompt are the engine's: the region that the model chose itself, named from outside."""
    asked = model()
    own = ask("always", asked, PICTURE, ASKED, OPTIONS)
    place = dataclasses.replace(ASKED, boxes=(own.regions[0].box,))
    named = read_fixed_box(asked, PICTURE, place, OPTIONS, place="oracle", margin_cells=0.0)[0]
    assert (named.regions[0].box, named.text, named.usage) == (own.regions[0].box, own.text, own.usage)
    asked = model()
    said = ask("oracle", asked, PICTURE, ASKED, OPTIONS)
    assert contains(said.regions[0].box, ASKED.boxes[0])
    two = dataclasses.replace(ASKED, boxes=((0, 0, 200, 150), (100, 60, 140, 80)))
    assert ask("oracle", asked, PICTURE, two, OPTIONS).regions == said.regions
    lost = ask("oracle", asked, PICTURE, dataclasses.replace(ASKED, boxes=()), OPTIONS)
    assert lost.regions == ()
    assert "not known" in lost.gate.note
    assert lost.text == asked.ask(PICTURE, ASKED.question, zoom="never", **LIMITS).text


def test_boxes_and_windows_by_hand():
    assert centre_box((100, 50), 0.4) == (30, 15, 70, 35)
    assert centre_box((1, 1), 0.4) == (0, 0, 1, 1)
    drawn = [random_box((200, 100), f"Question {i}?") for i in range(200)]
    assert all(x1 - x0 == 80 and y1 - y0 == 40 and x0 >= 0 and x1 <= 200 and y1 <= 100 for x0, y0, x1, y1 in drawn)
    assert len(set(drawn)) > 190
    assert min(x0 for x0, *_ in drawn) < 10
    assert max(x1 for _, _, x1, _ in drawn) > 190
    assert random_box((200, 100), "Question 0?") == drawn[0]
    assert random_box((200, 100), "Question 0?", seed=1) != drawn[0]
    flat = np.ones((10, 10))
    flat[2:4, 6:8] = 9.0
    assert best_window(flat) == (6, 2, 8, 4)
    wide = np.zeros((10, 10))
    wide[3:7, 2:6] = 1.0
    assert best_window(wide, (0.4,)) == (2, 3, 6, 7)
    assert best_window(np.array([[2.0]])) == (0, 0, 1, 1)
    assert best_window(np.zeros((3, 5))) == (0, 0, 1, 1)


def test_doubt_of_known_distributions():
    certain = torch.tensor([100.0, 0.0, 0.0, 0.0])
    tie = torch.tensor([5.0, 5.0, -100.0, -100.0])
    even = torch.zeros(4)
    assert margin_doubt(certain) == pytest.approx(0, abs=1e-6)
    assert margin_doubt(tie) == pytest.approx(1)
    assert margin_doubt(torch.tensor([math.log(0.7), math.log(0.2), math.log(0.1)])) == pytest.approx(0.5)
    assert entropy_doubt(certain) == pytest.approx(0, abs=1e-6)
    assert entropy_doubt(tie) == pytest.approx(0.5)
    assert entropy_doubt(even) == pytest.approx(0.75)
    assert entropy_doubt(torch.tensor([0.0, -math.inf])) == pytest.approx(0)


@pytest.mark.parametrize("name", ["margin", "entropy"])
def test_confidence_gates_zoom_from_their_threshold_on(name):
    asked = model()
    score = ask(name, asked, PICTURE, ASKED, OPTIONS).gate.score
    assert 0 < score < 1
    (at, at_extra), (above, above_extra) = (
        answered(name, asked, dataclasses.replace(OPTIONS, gate_threshold=value)) for value in (score, score + 1e-6)
    )
    assert (at.gate.zoomed, above.gate.zoomed) == (True, False)
    assert at.text == ask("always", asked, PICTURE, ASKED, OPTIONS).text
    assert at.regions == ask("always", asked, PICTURE, ASKED, OPTIONS).regions
    assert above.text == ask("plain", asked, PICTURE, ASKED, OPTIONS).text
    assert at_extra == {"upper_tokens": ask("plain", asked, PICTURE, ASKED, OPTIONS).usage.prompt_tokens}
    assert above_extra == {}


def test_attention_crops_need_full_attention_in_every_layer():
    hybrid = QZoom(tiny_models.engine("qwen3_5", heads=False))
    with pytest.raises(ConfigError, match=r"which qwen3_5 models lack; name another one with --method\."):
        ask("attention", hybrid, PICTURE, ASKED, OPTIONS)


def test_attention_crops_follow_the_question():
    asked = model()
    wide = dataclasses.replace(OPTIONS, coarse_tokens=TokenBudget(20, 30))
    texts = ("the date?", "How many red circles are there?", "Where?", "What is the total of the items and the tax?")
    asks = [ask("attention", asked, PICTURE, SampleQuestion("f", text, "a"), wide) for text in texts]
    assert len({said.regions[0].box for said in asks}) > 1
    said, extra = answered("attention", asked)
    assert said.timing_ms["attention"] > 0
    plain, other = (
        ask("plain", asked, PICTURE, dataclasses.replace(ASKED, question=text), OPTIONS).usage
        for text in (ASKED.question, GENERIC)
    )
    shared = asked.session(PICTURE, coarse_tokens=COARSE).ask(GENERIC, zoom="never").usage.reused_tokens
    assert extra == {
        "upper_tokens": plain.prompt_tokens,
        "other_tokens": other.prompt_tokens,
        "other_text_tokens": other.prompt_tokens - shared,
    }


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[100, 200, 500, 600]", (100, 100, 500, 300)), ("The box is (0,0) (1000,1000)", None),
        ("0 0 1000 1000", (0, 0, 1000, 500)), ('{"bbox_2d": [10.5, 20, 30, 41]}', (10, 10, 30, 21)),
        ("[500, 200, 100, 600]", None), ("[0, 0, 1001, 5]", None), ("33.90", None), ("", None),
    ],
)  # fmt: skip
def test_boxes_in_words(text, box):
    assert read_box(text, (1000, 500)) == box


def test_agentic_zoom_counts_what_it_cannot_read():
    asked = model()
    said, extra = answered("agentic", asked)
    assert extra["failures"] == 1
    assert said.regions == ()
    assert "Asked for a box" in said.gate.note
    assert extra["other_tokens"] > said.usage.prompt_tokens
    assert 0 < extra["other_text_tokens"] < extra["other_tokens"] - said.usage.coarse_tokens
    assert 0 < extra["completion_tokens"] <= 48
    assert said.text == asked.ask(PICTURE, ASKED.question, zoom="never", **LIMITS).text


def test_agentic_zoom_reads_the_box_that_it_is_told():
    """A random model says no boxes, so the reader takes any text for one; both rounds are real."""
    asked = model()
    box = (65, 45, 195, 135)
    said, extra = ask_for_box(asked, PICTURE, ASKED, OPTIONS, max_box_tokens=2, read=lambda text, size_px: box)
    assert said.regions[0].box == box
    assert extra["failures"] == 0
    assert extra["completion_tokens"] <= 2
    place = dataclasses.replace(ASKED, boxes=(box,))
    oracle = read_fixed_box(asked, PICTURE, place, OPTIONS, place="oracle", margin_cells=0.0)[0]
    assert (said.text, said.usage) == (oracle.text, oracle.usage)
