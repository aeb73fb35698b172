import dataclasses
import json

import numpy as np
import pytest

from benchmarks.ablation_labels import changed_labels, from_boxes, label_facts, relabelled, some_labels
from benchmarks.ablation_train import plain_base
from benchmarks.ablation_variants import GROUPS, REFERENCE, VARIANTS, chosen
from benchmarks.ablation_words import gate_verdict, markdown, skips, verdict
from benchmarks.ablations import main
from qzoom.checkpoints.weights import base_digest
from qzoom.config import ZoomConfig
from qzoom.errors import ConfigError, DataError
from qzoom.labels.settings import LabelMapSettings
from qzoom.model import QZoom
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Attention, Provenance, Question, RegionLabel, Response, Turn, content_id, tensor_digest
from qzoom.types import GateDecision
from tests.evaluation.samples import row

MAP = np.array(
    [
        [0.00, 0.00, 0.00, 0.00, 0.90],
        [0.00, 0.02, 0.15, 0.00, 0.00],
        [0.00, 0.20, 0.40, 0.05, 0.00],
        [0.00, 0.00, 0.05, 0.00, 0.00],
        [0.00, 0.00, 0.00, 0.00, 0.00],
    ],
    np.float32,
)
SINK = (np.float32(0.9) == MAP).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    """Three samples of one turn each; the sink in the upper right corner is the map's highest cell."""
    folder = tmp_path / "own"
    start_store(folder, "regions", {"tokens": 25}, Provenance("model", "abc"))
    with RecordWriter(folder) as writer:
        for number in range(3):
            turns = (Turn("Where?", ("here",), ((200, 200, 300, 300),)),)
            question = Question(f"q{number}", "p.png", turns, "text", "drawn", "")
            name = content_id(question)
            response = Response(name, 0, "Where?", "here", (1, 2), (500, 500), (5, 5))
            looked = Attention(content_id(response), ((1, 0),), "norm")
            digests = {"grounding": tensor_digest(MAP), "sink": tensor_digest(SINK)}
            label = RegionLabel(
                name, 0, content_id(response), content_id(looked, digests), "here", "Where?", (0, 0, 5, 5), True, 25,
                25, "dynamic", (500, 500),
            )  # fmt: skip
            maps = {"grounding": MAP, "sink": SINK}
            records = [(question, {}), (response, {}), (looked, maps), (label, {"labels": np.ones((5, 5), np.int8)})]
            writer.append(f"s{number}", records)
    return folder


def labels_in(folder):
    found = RecordStore(folder)
    return [(label, found.tensor(stored, "labels")) for stored, label in found.of_kind(RegionLabel)]


def test_other_labels_from_kept_attention(store, tmp_path):
    settings = LabelMapSettings(min_peak=0.0, ignore_share=1.0)
    own = labels_in(changed_labels(store, tmp_path / "tri", "tri", relabelled(settings)))
    assert len(own) == 3
    assert own[0][1].tolist() == [
        [-100, -100, -100, -100, 0],
        [-100, -100, 1, -100, 0],
        [-100, 1, 1, -100, 0],
        [-100, -100, -100, -100, 0],
        [0, 0, 0, 0, 0],
    ]
    assert own[0][0].agrees is True
    one = dataclasses.replace(settings, foreground=0.2, background=0.2)
    two = labels_in(changed_labels(store, tmp_path / "two", "two", relabelled(one, two_state=True)))
    assert (two[0][1] == 1).sum() == 3
    assert (two[0][1] == 0).sum() == 22
    assert two[0][0].valid == 25
    kept = labels_in(changed_labels(store, tmp_path / "sinks", "sinks", relabelled(settings, sinks=False)))
    assert kept[0][1][0, 4] == 1
    assert kept[0][0].foreground == 2
    boxes = labels_in(changed_labels(store, tmp_path / "boxes", "boxes", from_boxes))
    expected = np.zeros((5, 5), int)
    expected[1:4, 1:4] = -100
    expected[2, 2] = 1
    assert boxes[0][1].tolist() == expected.tolist()
    assert boxes[0][0].box == (2, 2, 3, 3)
    # finished stores are kept as they are
    before = (tmp_path / "boxes" / "records-00.jsonl").read_bytes()
    changed_labels(store, tmp_path / "boxes", "boxes", from_boxes)
    assert (tmp_path / "boxes" / "records-00.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="change was 'boxes', is 'two'"):
        changed_labels(store, tmp_path / "boxes", "two", relabelled(one))
    assert label_facts(store)["sinks"] == pytest.approx(1 / 25)


def test_some_labels(store, tmp_path):
    some = some_labels(store, tmp_path / "some", 2)
    assert len(labels_in(some)) == 2
    for _, label in RecordStore(some).of_kind(RegionLabel):  # with what they were made from
        assert RecordStore(some).tensor(RecordStore(some).get(label.attention), "grounding").shape == (5, 5)
    assert label_facts(some)["maps"] == 2
    with pytest.raises(DataError, match="3 usable maps, fewer than 4"):
        some_labels(store, tmp_path / "more", 4)


def test_the_variants_and_what_cannot_be_run():
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    assert {variant.group for variant in VARIANTS} == {"", *GROUPS}
    assert [variant.name for variant in chosen(["K2"])] == [REFERENCE, "K2"]
    for variant in VARIANTS:
        ZoomConfig.from_dict(dict(variant.zoom))  # refuses what it does not know
    with pytest.raises(ConfigError, match="No variant 'K9'"):
        main(["--only", "K9"])
    with pytest.raises(ConfigError, match="COARSE"):
        main(["--looks", "64"])


@pytest.mark.parametrize(
    ("intervals", "word"),
    [
        ([(-0.2, -0.1), (-0.1, 0.1)], "reproduced"),
        ([(0.1, 0.2), (-0.1, 0.1)], "the opposite"),
        ([(0.1, 0.2), (-0.2, -0.1)], "mixed"),
        ([(-0.1, 0.1), (0.0, 0.1)], "not told apart"),
    ],
)
def test_verdicts(intervals, word):
    assert verdict("higher", intervals) == word
    other = {"reproduced": "the opposite", "the opposite": "reproduced"}
    assert verdict("lower", intervals) == other.get(word, word)
    assert verdict("", intervals) == "no claim to check"


def gated(score, prediction):
    return dataclasses.replace(row(prediction), gate=GateDecision(score, 0.0, True))


def test_how_much_a_gate_skips():
    plain = [row("33.90"), row("1"), row("33.90"), row("1")]
    zoomed = [gated(0.1, "33.90"), gated(0.2, "1"), gated(0.6, "33.90"), gated(0.7, "33.90")]
    assert skips(plain, zoomed) == {
        "n": 4, "always": 0.75, "never": 0.5, "skip_no_loss": 0.75, "skip_one_point": 0.75,
    }  # fmt: skip


def gate(share):
    return {
        "training": {"samples": 40},
        "caps": {"128": {"n": 9, "always": 0.4, "never": 0.2, "skip_no_loss": share, "skip_one_point": share}},
    }


def test_the_gates_verdict():
    assert gate_verdict({"consistency": gate(0.5), "prediction_vs_gt": gate(0.3)}, [128]).startswith("same direction")
    assert gate_verdict({"consistency": gate(0.1), "prediction_vs_gt": gate(0.3)}, [128]).startswith("the opposite")
    assert gate_verdict({"consistency": {"note": "none"}, "prediction_vs_gt": gate(0.3)}, [128]) == "could not be tried"


def one(group, accuracy, **against):
    found = {"n": 9, "accuracy": accuracy, "hit": 0.5, "area": 0.1, "tokens": 120.0, "errors": 0} | against
    return {"title": f"a {group}", "group": group, "threshold": 0.6, "caps": {"128": found}}


def test_the_words():
    pair = {"against": {"difference": -0.1, "interval": [-0.2, -0.05]}}
    about = {"model": "tiny", "weights": "12ab", "device": "cpu"}
    figures = {"about": about, "limit": None, "notes": ["stage-2: nothing mined"], "gates": {"consistency": gate(0.5)}}
    text = markdown(figures | {"variants": {REFERENCE: one("", 0.5), "x": one("labels", 0.4, **pair)}}, [128])
    assert "Base of `tiny` (weights `12ab`), cpu." in text
    assert "| a labels | – | 0.6 | 40.0 | -10.0 | -20.0 to -5.0 | 50.0 | 10.0 | 120 |" in text
    assert "81.8 without" in text
    assert "\n9 questions at each cap.\n" in text
    assert "| reproduced |" in text
    assert "Left out: stage-2: nothing mined" in text
    other = one("labels", 0.4, **pair) | {"checks": False}
    trained = one("answers", 0.4, **pair) | {"training": {"stage": "answers", "samples": 7, "steps": 60}}
    text = markdown(figures | {"variants": {REFERENCE: one("", 0.5), "x": other, "y": trained}}, [128])
    assert "| no claim to check |" in text
    assert "Stage 2 trained 60 steps on 7 mined pictures." in text
    assert "| the opposite |" in text
    assert "| reproduced |" not in text
    assert "Nothing is finished yet" in markdown(figures | {"variants": {}}, [128])


def test_the_plain_base_is_the_same_base(tmp_path):
    base = plain_base("tiny", tmp_path / "base")
    model = QZoom.from_pretrained(base)
    assert not model.has_region
    assert base_digest(model.engine) == base_digest(QZoom.from_pretrained("tiny").engine)
    assert plain_base("tiny", tmp_path / "base") == base


def kept(folder):
    """Answers and labels by content; trained weights by the time when they were written."""
    out = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    return out | {path: path.stat().st_mtime_ns for path in folder.rglob("qzoom.safetensors")}


@pytest.mark.slow
def test_two_variants_stop_and_go_on(tmp_path):
    given = ["--kinds", "scenes", "--limit", 1, "--pictures", 2, "--heads", "4:0,2", "--steps", 2, "--batch", 2]
    given += ["--looks", "16+16", "--teacher-tokens", 64, "--label-tokens", 4, "--max-new-tokens", 1]
    given += ["--only", "union", "--device", "cpu", "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    given = [str(word) for word in given]
    assert main([*given, "--minutes", "0.0000001"]) == 3
    text = (tmp_path / "results" / "ablations.md").read_text(encoding="utf-8")
    assert "Nothing is finished yet" in text
    assert main(given) == 0
    figures = json.loads((tmp_path / "results" / "ablations.json").read_text(encoding="utf-8"))
    assert list(figures["variants"]) == [REFERENCE, "union"]
    assert figures["variants"][REFERENCE]["training"]["steps"] == 2
    assert figures["variants"]["union"]["caps"]["32"]["against"]["pictures"] == 1
    before = kept(tmp_path)
    assert main(given) == 0
    assert kept(tmp_path) == before
    with pytest.raises(ConfigError, match="other settings or other labels"):
        main([*given, "--steps", "3"])
