import dataclasses
import itertools
import random

import pytest

from qzoom.distill.items import Vote
from qzoom.distill.vote import VoteSettings, agree, reachable, vote_step
from qzoom.errors import ConfigError
from tests.distill.views import ITEM, Judge

EIGHT = VoteSettings()


def votes(**by_teacher: list[str | None]) -> list[Vote]:
    """Texts; None is an abstention, "!" a failure."""
    out = []
    for teacher, texts in by_teacher.items():
        for sample, text in enumerate(texts):
            status = "abstained" if text is None else "failed" if text == "!" else "answered"
            out.append(Vote(teacher, sample, text if text and status == "answered" else "", status))
    return out


def test_six_of_eight_with_three_from_each():
    found, reason = agree(votes(a=["1,234.50", "1234.5", "1234.5", "9"], b=["1234.50", "1234.5", "1234.5", "!"]), EIGHT)
    assert reason == ""
    assert found is not None
    assert (found.text, found.count, found.votes, found.by) == ("1234.5", 6, 7, "rule")
    assert found.by_teacher == (("a", 3), ("b", 3))


def test_numbers_of_houses_are_no_votes_for_no():
    texts = [f"No. {number}, Jalan Besar" for number in range(4)]
    assert agree(votes(a=texts, b=texts), EIGHT)[1] == "no agreement"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"a": ["x"] * 4, "b": ["x", "x", "y", "y"]}, "too few teachers agree"),
        ({"a": ["x", "x", "y", "y"], "b": ["x", "y", "x", "z"]}, "no agreement"),
        ({"a": ["x", "x", "x", "!"], "b": ["x", "x", "!", "!"]}, "too many failed answers"),
        ({"a": ["x", "x", "x", None], "b": ["x", "x", None, None]}, "too many abstentions"),
        ({"a": ["x", None, None, None], "b": ["x", None, None, None]}, "the teachers cannot tell"),
        ({"a": [None] * 4, "b": [None] * 4}, "the teachers cannot tell"),
        ({"a": ["!"] * 4, "b": ["!"] * 4}, "no usable answer"),
        ({}, "no usable answer"),
    ],
)
def test_every_refusal_has_its_reason(given, reason):
    assert agree(votes(**given), EIGHT)[1] == reason


def test_failures_and_skipped_samples_never_vote():
    failed = [Vote(teacher, i, "", "failed", "HTTP 500") for teacher in "ab" for i in range(3)]
    found, reason = agree([*failed, Vote("a", 3, "x"), Vote("b", 3, "x")], EIGHT)
    assert reason == "too many failed answers"
    assert found is not None
    assert (found.text, found.count, found.votes) == ("x", 2, 2)
    skipped = [Vote("b", sample, "", "skipped") for sample in range(4)]
    found, reason = agree([*votes(a=["x", "y", "x", "y"]), *skipped], EIGHT)
    assert reason == "no agreement was possible any more"
    assert found is not None
    assert found.votes == 4


def test_giving_up_never_loses_an_agreement():
    rng = random.Random(0)
    lost = 0
    for _ in range(400):
        every = votes(a=rng.choices("xxxxy", k=4), b=rng.choices(["x", "x", "x", "y", None], k=4))
        agreed = agree(every, EIGHT)[1] == ""
        for done in range(len(every) + 1):
            left = {name: sum(vote.teacher == name for vote in every[done:]) for name in "ab"}
            worth = reachable(every[:done], left, EIGHT, judged=False)
            assert worth or not agreed
            lost += not worth
        assert worth is agreed
    assert lost > 400


def test_the_order_of_votes_changes_nothing():
    given = votes(a=["Red bus", "a red bus", "red bus", "bus"], b=["bus", "red bus", "BUS", "Red bus"])
    settings = VoteSettings(quorum=5, per_teacher=2)
    first = agree(given, settings)
    for seed in range(20):
        mixed = random.Random(seed).sample(given, len(given))
        assert agree(mixed, settings) == first
    assert first[0] is not None
    assert first[0].text == "Red bus"


SPLIT = votes(a=["dark red", "dark red", "maroon", "green"], b=["maroon", "maroon", "dark red", "4"])
ASKED = dataclasses.replace(ITEM, votes=tuple(SPLIT))


def test_a_judge_joins_what_rules_leave_open_or_leaves_it():
    judge = Judge(("dark red", "maroon"))
    (item,) = vote_step(EIGHT, judge)(ASKED)
    assert item.kept
    assert item.answer is not None
    assert (item.answer.text, item.answer.count, item.answer.by) == ("maroon", 6, "judge")
    assert item.models == (("judge", "judge@1"),)
    (item,) = vote_step(EIGHT, Judge(refuses=True))(ASKED)
    assert item.decisions[-1].reason == "no agreement"
    assert item.answer is not None
    assert item.answer.by == "rule"


def test_the_judge_is_asked_only_where_its_word_counts():
    settled, hopeless = Judge(), Judge()
    clear = votes(a=["x"] * 4, b=["x", "x", "x", "y"])
    vote_step(EIGHT, settled)(dataclasses.replace(ITEM, votes=tuple(clear)))
    few = votes(a=["x", "y", "!", "!"], b=["x", "z", "w", "!"])
    vote_step(EIGHT, hopeless)(dataclasses.replace(ITEM, votes=tuple(few)))
    assert settled.draft == hopeless.draft == []
    numbers = Judge()
    vote_step(EIGHT, numbers)(
        dataclasses.replace(ITEM, votes=tuple(votes(a=["1", "2", "3", "4"], b=["5", "6", "7", "8"])))
    )
    assert numbers.draft == []


def test_answers_told_by_the_question_and_senseless_quorums_are_refused():
    told = dataclasses.replace(ITEM, votes=tuple(votes(a=["star"] * 4, b=["Star"] * 4)))
    (item,) = vote_step(EIGHT)(told)
    assert item.decisions[-1].reason == "the question holds the answer"
    with pytest.raises(ConfigError, match="set quorum to at least 8"):
        VoteSettings(quorum=6, per_teacher=4)
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        VoteSettings(quorum=True)
    with pytest.raises(ConfigError, match="can never give 6 votes"):
        EIGHT.check_counts(1, 8)
    EIGHT.check_counts(2, 4)
    for teachers, samples in itertools.product((1, 3), (2, 5)):
        VoteSettings(teachers * samples, samples, teachers).check_counts(teachers, samples)
