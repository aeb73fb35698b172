import dataclasses

import pytest
import typer

from qzoom.cli.options import LookOptions, parse_tokens, split_inputs
from qzoom.config import RereadRule, TokenBudget
from qzoom.model import QZoom
from tests import tiny_models


@pytest.mark.parametrize(
    ("text", "value"), [(None, None), ("144", 144), ("64:144", TokenBudget(64, 144)), ("7:7", TokenBudget(7, 7))]
)
def test_token_limits(text, value):
    assert parse_tokens(text, "--coarse-tokens") == value


@pytest.mark.parametrize("text", ["", ":", "5:", ":5", "-5", "1:2:3", "1e3", "٣", "12345678901", "a"])
def test_token_limits_that_are_no_numbers(text):
    with pytest.raises(typer.BadParameter, match="MAX nor MIN:MAX"):
        parse_tokens(text, "--coarse-tokens")


@pytest.mark.parametrize(
    ("text", "sentence"), [("9:8", "the minimum 9 is above the maximum 8"), ("0:8", "0 is too small; the least is 1")]
)
def test_token_limits_that_contradict(text, sentence):
    with pytest.raises(typer.BadParameter, match=sentence):
        parse_tokens(text, "--coarse-tokens")


def test_the_last_word_is_the_question():
    assert split_inputs(["a.png", "b c.png", "Which one?"]) == (["a.png", "b c.png"], "Which one?")
    assert split_inputs(["-", "What?"]) == (["-"], "What?")


def test_read_once_turns_reading_again_off():
    base = tiny_models.engine("qwen3_vl")
    config = base.config.replace(reread=RereadRule(layer=1, heads=(0,)))
    model = QZoom(dataclasses.replace(base, config=config))
    assert LookOptions().configured(model).config.reread == config.reread
    assert LookOptions(once=True).configured(model).config.reread is None
