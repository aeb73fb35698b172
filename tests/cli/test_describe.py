from qzoom.cli.ask import count_full_tokens, describe_cost, describe_gate, describe_regions
from qzoom.types import GateDecision, Region, Usage


def test_gate_and_regions_in_words():
    assert describe_gate(GateDecision(0.25, 0.1, True)) == "gate    0.250 (zooms from 0.100): zooms in"
    assert (
        describe_gate(GateDecision(0.05, 0.1, False)) == "gate    0.050 (zooms from 0.100): the coarse view is enough"
    )
    assert describe_gate(GateDecision(0.99996, 1.0, False)).startswith("gate    0.99996 (zooms from 1.00000):")
    assert describe_gate(GateDecision(1 - 1e-6, 1.0, False)).startswith("gate    0.999999 (zooms from 1.000000):")
    assert describe_gate(GateDecision(0.1, 0.1, True)).startswith("gate    0.100 (zooms from 0.100):")
    assert describe_gate(GateDecision(0.9, 0.1, False, "the map is empty")).endswith("0.100): the map is empty")
    assert describe_gate(GateDecision(None, None, False)) == "gate    not asked"
    assert describe_gate(GateDecision(None, None, True)) == "gate    not asked: zooms in"
    one = describe_regions([Region((0, 10, 50, 30), 0.5)], [(100, 200)])
    assert one == ["region  [0, 10, 50, 30] px, score 0.500, 5.0% of the picture"]
    two = describe_regions([Region((0, 0, 50, 100), 0.5, image=1)], [(9, 9), (100, 200)])
    assert two == ["region  picture 2, [0, 0, 50, 100] px, score 0.500, 25.0% of the picture"]
    again = describe_regions([Region((0, 10, 50, 30), 0.5, reread=True)], [(100, 200)])
    assert again == ["reread  [0, 10, 50, 30] px, score 0.500, 5.0% of the picture"]


def test_costs_and_savings_in_words():
    usage = Usage(coarse_tokens=136, region_tokens=88, prompt_tokens=250, completion_tokens=6, reused_tokens=140)
    assert (
        describe_cost(usage, {"vision": 20.4, "idle": 0.1, "total": 1234.0})
        == "cost    136 coarse + 88 region visual tokens, 6 generated, 140 reused; 1.23 s (ms: vision 20)"
    )
    usage = Usage(coarse_tokens=136, region_tokens=64)
    saved = "136 coarse + 64 region visual tokens (88% saved of 1652 at native resolution)"
    assert describe_cost(usage, {}, 1652) == f"cost    {saved}"
    assert "saved" not in describe_cost(usage, {}, 200)
    assert "saved" not in describe_cost(usage, {})
    assert count_full_tokens([(900, 1900)], 32) == 28 * 59
    assert count_full_tokens([(900, 1900), (5, 64)], 32) == 28 * 59 + 2
    assert count_full_tokens([(900, 1900)], 0) == 0
