import random

import numpy as np
import pytest

from qzoom.config import TokenBudget
from qzoom.engine.request import budget, split_budget
from qzoom.errors import BudgetError


def test_the_parts_keep_the_whole_budget():
    draw = random.Random(0)
    for _ in range(2000):
        areas = [draw.randint(1, 10_000_000) for _ in range(draw.randint(1, 8))]
        high = draw.randint(len(areas), 600)
        total = TokenBudget(draw.randint(1, high), high)
        parts = split_budget(total, areas)
        assert len(parts) == len(areas)
        assert sum(p.max_tokens for p in parts) == high
        assert sum(p.min_tokens for p in parts) == max(total.min_tokens, len(areas))


def test_larger_regions_get_more_and_too_few_tokens_are_refused():
    parts = split_budget(TokenBudget(3, 103), [100, 300, 600])
    assert [p.max_tokens for p in parts] == [11, 31, 61]
    assert split_budget(TokenBudget(5, 9), [1234]) == [TokenBudget(5, 9)]
    with pytest.raises(BudgetError, match="2 tokens for 3 regions"):
        split_budget(TokenBudget(1, 2), [5, 5, 5])


def test_budgets_as_callers_write_them():
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
