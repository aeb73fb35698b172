import dataclasses
import random

import numpy as np
import pytest

from qzoom.config import BoxRule, TokenBudget
from qzoom.engine.request import budget, fit_regions, split_budget
from qzoom.errors import BudgetError
from qzoom.heads.boxes import MapBox
from tests import tiny_models
from tests.flow import request


def test_budgets_and_their_parts():
    draw = random.Random(0)
    for _ in range(2000):
        areas = [draw.randint(1, 10_000_000) for _ in range(draw.randint(1, 8))]
        high = draw.randint(len(areas), 600)
        total = TokenBudget(draw.randint(1, high), high)
        parts = split_budget(total, areas)
        assert len(parts) == len(areas)
        assert sum(p.max_tokens for p in parts) == high
        assert sum(p.min_tokens for p in parts) == max(total.min_tokens, len(areas))
    parts = split_budget(TokenBudget(3, 103), [100, 300, 600])
    assert [p.max_tokens for p in parts] == [11, 31, 61]
    assert split_budget(TokenBudget(5, 9), [1234]) == [TokenBudget(5, 9)]
    with pytest.raises(BudgetError, match="2 tokens for 3 regions"):
        split_budget(TokenBudget(1, 2), [5, 5, 5])
    standard = TokenBudget(4, 30)
    assert budget(None, standard) is None
    assert budget(100, standard) == TokenBudget(4, 100)
    assert budget(2, standard) == TokenBudget(2, 2)
    assert budget((7, 9), standard) == TokenBudget(7, 9)
    assert budget(np.int64(100), standard) == TokenBudget(4, 100)
    assert budget((np.int32(7), 9), standard) == TokenBudget(7, 9)
    with pytest.raises(BudgetError, match=r"^Visual tokens must be at least 1, not 0\.$"):
        budget(0, standard)
    with pytest.raises(BudgetError, match=r"pair as a tuple, such as .*, not \[16, 64\]"):
        budget([16, 64], standard)
    own = TokenBudget(1, 5)
    assert budget(own, standard) is own
    for bad in (0, -1, True, 1.5, "3", (1, 2, 3), (5, 4), (0, 4), [7, 9]):
        with pytest.raises(BudgetError):
            budget(bad, standard)


def test_regions_share_by_area_or_equally():
    base = tiny_models.engine("qwen3_vl")
    asked = request(base, tiny_models.picture(5), "When?", region_tokens=TokenBudget(3, 103))
    boxes = [MapBox(0, (0, 0, 1, 1), (0, 0, side, 10), 0.5) for side in (10, 30, 60)]
    for shares, expected in (("area", [11, 31, 61]), ("equal", [34, 34, 35])):
        engine = dataclasses.replace(base, config=base.config.replace(box=BoxRule(shares=shares)))
        assert [part.max_tokens for part in fit_regions(engine, asked, 20, boxes)[1]] == expected
