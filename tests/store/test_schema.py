"""Records: values in and out, ids that follow the content, and what is refused."""

import dataclasses

import numpy as np
import pytest

from qzoom.errors import DataError
from qzoom.store.schema import (
    KINDS,
    Question,
    RegionLabel,
    ResolutionSweep,
    Turn,
    Verdict,
    content_id,
    record_from_values,
    tensor_digest,
)

QUESTION = Question(
    "q1", "a.png", (Turn("What?", ("x", "y"), ((0, 1, 2, 3),)), Turn("Where?")), "natural", "mine", "/d"
)
LABEL = RegionLabel("q", 0, "r", "a", "text", "prompt", (0, 0, 2, 2), True, 1, 9, "dynamic", (30, 40), None)
LADDER = ResolutionSweep("q", 0, (64, 128), ("a", "b"), "b")
VERDICT = Verdict("q", 0, "a", "b", True, None, "judge", ((0, 0, 5, 5),))


@pytest.mark.parametrize("record", [QUESTION, LABEL, LADDER, VERDICT])
def test_values_make_the_same_record(record):
    assert record_from_values(record.kind, record.values(), "here") == record


def test_ids_and_digests_follow_content():
    other = dataclasses.replace(QUESTION, mode="text")
    assert content_id(QUESTION) == content_id(record_from_values("question", QUESTION.values(), "x"))
    assert content_id(QUESTION) != content_id(other)
    digests = {"labels": tensor_digest(np.zeros((2, 2), np.int8))}
    assert content_id(LABEL, digests) != content_id(LABEL)
    assert len(content_id(LABEL)) == 20
    base = np.zeros((2, 3), np.int8)
    changed = base.copy()
    changed[1, 1] = 1
    seen = [tensor_digest(a) for a in (base, base.reshape(3, 2), base.astype(np.uint8), changed)]
    assert len(set(seen)) == 4
    assert set(KINDS) == {
        "question",
        "response",
        "attention",
        "region_label",
        "ladder",
        "zoom_comparison",
        "verdict",
        "skip",
    }
    assert all(KINDS[name].kind == name for name in KINDS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extra": 1}, "unknown field 'extra'"), ({"turn": "0"}, "turn must be of type int"),
        ({"turn": True}, "turn must be of type int"), ({"tokens": 64}, "tokens must be a list"),
        ({"tokens": ["64"]}, "tokens must be of type int"), ({"annotation": None}, "annotation must be of type str"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_their_place(values, message):
    with pytest.raises(DataError, match=f"line 7.*{message}"):
        record_from_values("ladder", LADDER.values() | values, "line 7")


def test_missing_fields_and_unknown_kinds_are_refused():
    with pytest.raises(DataError, match="'answers' is missing"):
        record_from_values("ladder", {"question": "q", "turn": 0, "tokens": []}, "x")
    with pytest.raises(DataError, match="unknown kind of record 'ladders'"):
        record_from_values("ladders", {}, "x")
    with pytest.raises(DataError, match="must be one of rule, judge, nobody"):
        record_from_values("verdict", VERDICT.values() | {"by": "guess"}, "x")
    with pytest.raises(DataError, match="must hold 4 values"):
        record_from_values("verdict", VERDICT.values() | {"boxes": [[1, 2, 3]]}, "x")
