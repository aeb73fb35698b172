import pytest

from qzoom.data.benchmarks.registry import open_task
from qzoom.data.synthetic.page import HELD_OUT_SEEDS
from qzoom.errors import ConfigError


@pytest.mark.parametrize("name", ["documents", "scenes"])
def test_pictures_are_fixed_by_their_number(name):
    task = open_task(name, seed=40, count=3)
    assert task.ids == (f"{name}-40", f"{name}-41", f"{name}-42")
    assert task.identity == {"task": name, "seed": 40}
    later = open_task(name, seed=42, count=1).sample(0)
    here = task.sample(2)
    assert here.id == later.id
    assert here.image.tobytes() == later.image.tobytes()
    assert (here.questions, here.size_px) == (later.questions, here.image.size)
    assert here.questions != task.sample(1).questions


@pytest.mark.parametrize("name", ["documents", "scenes"])
def test_places_are_in_the_picture_and_never_all_of_it(name):
    questions = 0
    for sample in map(open_task(name, count=2).sample, range(2)):
        width, height = sample.size_px
        for asked in sample.questions:
            questions += 1
            assert asked.easy in (True, False)
            assert asked.answer
            for x0, y0, x1, y1 in asked.boxes:
                assert 0 <= x0 < x1 <= width
                assert 0 <= y0 < y1 <= height
                assert (x1 - x0) * (y1 - y0) < width * height
    assert questions > 6


def test_the_last_number_and_no_more():
    last = len(HELD_OUT_SEEDS) - 1
    assert open_task("scenes", seed=last, count=1).sample(0).questions
    with pytest.raises(ConfigError, match=f"0 to {last}"):
        open_task("scenes", seed=last, count=2)


@pytest.mark.parametrize(("name", "said"), [("receipt", "did you mean 'receipts'"), ("zzz", "known tasks: receipts")])
def test_unknown_tasks(name, said):
    with pytest.raises(ConfigError, match=said):
        open_task(name)


def test_receipts_need_a_folder():
    with pytest.raises(ConfigError, match="--data"):
        open_task("receipts")
