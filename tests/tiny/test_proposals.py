import json
from pathlib import Path

import numpy as np
import pytest

from qzoom.errors import ConfigError, DataError
from qzoom.model import QZoom
from tests.tiny.test_train import _recipe
from tiny.curriculum import Context, region_box
from tiny.proposals import propose, read_proposals
from tiny.train import Run, make_packs, open_packs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe with document pairs, its packs, and the boxes that the packaged model proposes for them."""
    folder = tmp_path_factory.mktemp("proposals")
    proposals = folder / "boxes"
    stages = [{"name": "pairs", "minutes": 1, "mix": {"document_pair": 1.0}}]
    recipe = _recipe(folder, 1, stages=stages, proposals=str(proposals))
    make_packs(recipe)
    packs = open_packs(recipe)
    proposals.mkdir()
    model = QZoom.from_pretrained("tiny")
    propose(model, packs["documents_train"], proposals / "documents_train.jsonl", per_page=3)
    return recipe, packs, model


def test_boxes_lie_in_their_pages_and_many_hold_the_answer(made):
    recipe, packs, _ = made
    found = read_proposals(Path(recipe.proposals), packs)
    pages = {page.name: page for page in packs["documents_train"]}
    assert {name for name, _ in found} == set(pages)
    held = []
    for (name, asked), (x0, y0, x1, y1) in found.items():
        height, width = pages[name].pixels.shape[:2]
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        boxes = next(q.boxes for q in pages[name].questions if q.question == asked)
        held.append(any(x0 <= b[0] and y0 <= b[1] and b[2] <= x1 and b[3] <= y1 for b in boxes))
    assert len(held) >= 2 * len(pages)
    assert np.mean(held) > 0.4


def test_a_killed_proposal_goes_on_and_another_one_is_refused(made, tmp_path):
    recipe, packs, model = made
    whole = Path(recipe.proposals) / "documents_train.jsonl"
    part = tmp_path / "documents_train.jsonl"
    data = whole.read_bytes()
    part.write_bytes(data[: data.index(b"\n", data.index(b"\n") + 1) + 20])  # header, one page, a torn line
    propose(model, packs["documents_train"], part, per_page=3)
    assert part.read_bytes().split(b"\n")[1:] == data.split(b"\n")[1:]
    with pytest.raises(ConfigError, match=r"made with other settings \(seed"):
        propose(model, packs["documents_train"], part, per_page=3, seed=1)


def test_no_boxes_are_named_with_the_command_that_makes_them(made, tmp_path):
    with pytest.raises(DataError, match=r"python tiny/train.py propose"):
        read_proposals(tmp_path, made[1])


def test_boxes_of_another_pack_or_of_part_of_one_are_refused(made, tmp_path):
    recipe, packs, _ = made
    lines = (Path(recipe.proposals) / "documents_train.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "documents_train.jsonl"
    part.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=r"documents_train\.jsonl lacks the boxes of 1 of 2 pages"):
        read_proposals(tmp_path, packs)
    header = json.loads(lines[0])
    header["settings"]["pack"]["seed"] = 5
    part.write_text("".join([json.dumps(header) + "\n", *lines[1:]]))
    with pytest.raises(DataError, match=r"boxes of another pack \(seed was 5, is 1\)"):
        read_proposals(tmp_path, packs)


def test_a_region_is_the_proposed_box_only_where_it_holds_the_answer(made):
    _, packs, _ = made
    page = packs["documents_train"][0]
    question = next(q for q in page.questions if q.boxes)
    answer = np.array(question.boxes[0])
    around = tuple(np.maximum(answer + np.array([-70, -50, 60, 80]), 0).tolist())
    beside = (int(answer[2]), around[1], int(answer[2]) + 90, around[3])
    for box, share in ((around, 0.6), (beside, 0.0)):
        context = Context(packs, np.random.default_rng(0), proposals={(page.name, question.question): box})
        drawn = [region_box(context, page, question, 40.0) for _ in range(300)]
        proposed = np.array([region for region, was in drawn if was])
        assert len(proposed) / 300 == pytest.approx(share, abs=0.1)
        if len(proposed):
            assert np.abs(proposed - np.array(around)).max() <= 20.5


def test_training_draws_from_the_boxes(made, tmp_path):
    recipe, packs, _ = made
    with_boxes = Run(recipe, tmp_path / "a")
    assert with_boxes.proposals == read_proposals(Path(recipe.proposals), packs)
    before = with_boxes.draw(0)
    with_boxes.proposals.clear()
    after = with_boxes.draw(0)
    shapes = [[view.shape for example in drawn for view in example.views] for drawn in (before, after)]
    assert shapes[0] != shapes[1]
