import pytest

from qzoom.distill.ask import answer_step, read_vote
from qzoom.distill.items import Vote
from qzoom.distill.roles import Role
from qzoom.distill.vote import VoteSettings
from qzoom.errors import CallRefusedError, ConfigError, DataError
from tests.distill.views import ITEM, StillViews


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("<answer>A4</answer>", "A4"),
        ("It says B7.\n<answer>B7</answer> or rather\n<answer>\n**B8**\n</answer>", "B8"),
        ("<think>is it <answer>no</answer>?</think> <answer>yes</answer>", "yes"),
        ("so the total is \\boxed{12.50}", "12.50"), ("\\boxed{12.50} so \\boxed{12.5}", "12.5"),
        ("<answer>\\boxed{\\text{red bus}}</answer>", "red bus"), ("\\boxed{a {nested} value}", "a {nested} value"),
        ("**12/03/2024**", "12/03/2024"), ("`X_1_2`", "X_1_2"), ("Answer: **red**", "red"),
        ("The answer is: red", "red"), ("# A4", "A4"), ("- A4", "A4"), ("$12$", "12"), ("5*3*2", "5*3*2"),
        ("[A4](http://x.example/)", "A4"),
    ],
)  # fmt: skip
def test_the_answer_is_read(reply, text):
    found = read_vote("", 0, reply)
    assert (found.text, found.status, found.reason) == (text, "answered", "")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"), ("<answer> </answer>", "empty"), ("** **", "empty"), ("\\boxed{}", "empty"),
        ("\\boxed{3} or \\boxed{4}", "several boxed values"),
        ("<answer>\\boxed{3}, \\boxed{4}</answer>", "several boxed values"), ("<answer>4", "not closed"),
        ("<answer>4</answer> no, <answer>5", "not closed"), ("\\boxed{4", "not closed"),
        ("<think>well, 4", "inside its thoughts"), ("first line\nsecond line", "a long reply"),
        ("word " * 60, "a long reply"), ("<answer>" + "word " * 300 + "</answer>", "a long reply"),
    ],
)  # fmt: skip
def test_what_is_no_answer_fails_with_a_reason(reply, reason):
    found = read_vote("", 0, reply)
    assert (found.text, found.status) == ("", "failed")
    assert reason in found.reason


@pytest.mark.parametrize(
    "reply", ["I don't know.", "<answer>Cannot tell</answer>", "\\boxed{unanswerable}", "Illegible"]
)
def test_a_teacher_may_say_that_it_cannot_tell(reply):
    assert read_vote("", 0, reply).status == "abstained"


def test_a_reply_that_was_cut_off_needs_a_closed_tag_and_long_ones_take_no_time():
    assert read_vote("", 0, "12.", cut_off=True).reason == "cut off at the token limit"
    assert read_vote("", 0, "<answer>12</answer> beca", cut_off=True).text == "12"
    assert read_vote("", 0, "<answer>" * 50_000 + "x" + "</answer>" * 50_000).status == "failed"
    assert read_vote("", 0, "\\boxed{" * 50_000).status == "failed"
    assert read_vote("", 0, "*_" * 100_000).status == "failed"


def teacher(name, *replies):
    """Gives the replies in order; an error is raised."""

    def call(item, views, sample):
        if isinstance(replies[sample], Exception):
            raise replies[sample]
        return Vote(name, sample, replies[sample])

    return Role(name, f"model of {name}", call)


def test_every_teacher_gives_every_sample_and_refused_calls_are_no_answers():
    teachers = (teacher("one", "A4", "A4"), teacher("two", "A4", CallRefusedError("HTTP 413")))
    (item,) = answer_step(teachers, StillViews(), samples=2)(ITEM)
    assert item.votes == (
        Vote("one", 0, "A4"),
        Vote("one", 1, "A4"),
        Vote("two", 0, "A4"),
        Vote("two", 1, "", "failed", "HTTP 413"),
    )
    assert item.models == (("teacher", "model of one"), ("teacher", "model of two"))


def test_hopeless_questions_are_given_up_and_no_others():
    def statuses(first: str, second: str, *, judged: bool = False) -> str:
        teachers = (teacher("one", *first), teacher("two", *second))
        (item,) = answer_step(teachers, StillViews(), 4, VoteSettings(), judged=judged)(ITEM)
        return "".join(vote.status[0] for vote in item.votes)

    assert statuses("aaaa", "aaab") == "aaaaaaaa"
    assert statuses("abab", "aaaa") == "aaaassss"
    assert statuses("aaab", "cdaa") == "aaaaaass"
    assert statuses("abab", "aaaa", judged=True) == "aaaaaaaa"


def test_what_cannot_be_asked_is_said():
    with pytest.raises(ConfigError, match="names of their own"):
        answer_step((teacher("one"), teacher("one")), StillViews())
    with pytest.raises(ConfigError, match="samples must be"):
        answer_step((teacher("one"),), StillViews(), samples=0)
    import dataclasses

    with pytest.raises(DataError, match="run the step ask first"):
        answer_step((teacher("one"),), StillViews(), 1)(dataclasses.replace(ITEM, draft=None))
