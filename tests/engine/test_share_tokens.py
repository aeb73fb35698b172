import pytest

from qzoom.config import TokenBudget, ZoomConfig
from qzoom.engine.request import share_tokens
from qzoom.errors import BudgetError

OWN = TokenBudget(4, 1000)
PLAIN = ZoomConfig()
READER = ZoomConfig(coarse_tokens=TokenBudget(16, 144), region_tokens=TokenBudget(64, 144))


@pytest.mark.parametrize(
    ("zoom", "limits", "expected"),
    [
        ("never", {}, (None, None)),
        ("never", {"total": 288}, (TokenBudget(4, 288), None)),
        ("never", {"total": 288, "coarse": 144}, (TokenBudget(4, 144), None)),
        ("never", {"coarse": 144, "region": 500, "total": 288}, (TokenBudget(4, 144), None)),
        ("auto", {}, (None, None)),
        ("auto", {"total": 288}, (TokenBudget(4, 144), TokenBudget(4, 144))),
        ("always", {"total": 289}, (TokenBudget(4, 145), TokenBudget(4, 144))),
        ("auto", {"total": 288, "coarse": 64}, (TokenBudget(4, 64), TokenBudget(4, 224))),
        ("auto", {"total": 288, "region": TokenBudget(32, 100)}, (TokenBudget(4, 188), TokenBudget(32, 100))),
        ("auto", {"total": 288, "coarse": 100, "region": 100}, (TokenBudget(4, 100), TokenBudget(4, 100))),
        ("auto", {"coarse": 144}, (TokenBudget(4, 144), TokenBudget(4, 144))),
        ("auto", {"region": 2}, (None, TokenBudget(2, 2))),
    ],
)
def test_shares(zoom, limits, expected):
    assert share_tokens(zoom, PLAIN, OWN, **limits) == expected


def test_a_maximum_keeps_the_checkpoints_minimum():
    assert share_tokens("auto", READER, OWN, total=288) == (TokenBudget(16, 144), TokenBudget(64, 144))
    assert share_tokens("auto", READER, OWN, total=64) == (TokenBudget(16, 32), TokenBudget(32, 32))
    assert share_tokens("auto", READER, OWN, coarse=64) == (TokenBudget(16, 64), None)


@pytest.mark.parametrize(
    ("zoom", "limits"),
    [
        ("auto", {"total": 1}), ("never", {"total": 0}), ("never", {"total": 100, "coarse": 101}),
        ("auto", {"total": 100, "coarse": 100}), ("auto", {"total": 100, "region": TokenBudget(1, 100)}),
        ("always", {"total": 100, "coarse": 60, "region": 41}), ("auto", {"coarse": 0}),
    ],
)  # fmt: skip
def test_contradictions(zoom, limits):
    with pytest.raises(BudgetError):
        share_tokens(zoom, PLAIN, OWN, **limits)
