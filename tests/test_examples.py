import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_examples", EXAMPLES / "make_examples.py")
    module = sys.modules["make_examples"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_examples"]


def test_drawn_again_the_pictures_are_the_same_and_amounts_add_up(script, tmp_path):
    script.main(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["delivery-note.jpg", "receipt.jpg"]
    for name in made:
        with Image.open(EXAMPLES / name) as kept, Image.open(tmp_path / name) as drawn:
            assert kept.size == drawn.size
            difference = np.abs(np.asarray(kept, dtype=float) - np.asarray(drawn, dtype=float)).mean()
        assert difference < 2, name
        assert (EXAMPLES / name).stat().st_size < 400_000
    assert [script.money(item.cost_cents) for item in script.GROCERIES[:2]] == ["6.40", "7.85"]
    assert sum(item.cost_cents for item in script.GROCERIES) == 8389
    assert script.money(123456) == "1,234.56"
