import base64
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom.distill import by_endpoint
from qzoom.distill.ask import answer_step, ask_step, validate_step
from qzoom.distill.items import Agreement, Vote
from qzoom.distill.roles import Role, RoleSettings
from qzoom.llm.cache import CallCache
from qzoom.llm.client import Client, SharedClient
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling
from qzoom.scoring.judge import Judge
from tests.distill.views import ITEM, StillViews
from tests.llm.stub import Stub, always, serve, text_of

EMPTY = dataclasses.replace(ITEM, draft=None)
VIEWS = StillViews()


@contextmanager
def behind(
    folder: Path, answer: Callable[[dict[str, Any], int], Any], role: str = "teacher"
) -> Iterator[tuple[Client, Stub]]:
    stub = Stub(answer)
    with serve(stub) as url:
        shared = SharedClient(CallCache(folder / "calls.sqlite"), CallSettings(retries=2, backoff_s=0.001))
        try:
            yield Client(role, "big", [EndpointSettings(url, "m-1")], Sampling(), shared), stub
        finally:
            shared.close()


def role(client: Client, call: Callable[..., Any], **settings: Any) -> Role[Any]:
    member = RoleSettings(by="endpoint", endpoints=client.endpoints, **settings)
    return Role(client.name, client.model, partial(call, client=client, member=member))


def sizes(body: dict[str, Any]) -> list[tuple[int, int]]:
    out = []
    for part in body["messages"][-1]["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            with Image.open(io.BytesIO(data)) as image:
                out.append(image.size)
    return out


def test_the_question_writer_sees_the_crop_alone_and_writes_questions(tmp_path):
    rows = [
        {"question": " What  does the tag say? ", "kind": "OCR"}, {"question": "what does the tag say?", "kind": "ocr"},
        {"question": "What color is it?", "kind": "color"}, "What is it made of?", {"question": 3},
        {"question": "How many?", "kind": "guessing"},
    ]  # fmt: skip
    reply = "Here [all I see] they are:\n```json\n" + json.dumps(rows) + "\n```"
    with behind(tmp_path, always(reply), "question_writer") as (client, stub):
        items = ask_step(role(client, by_endpoint.write_questions, count=4), VIEWS)(EMPTY)
    assert [(item.draft.text, item.draft.kind, item.draft.writer) for item in items] == [
        ("What does the tag say?", "ocr", "big"),
        ("What color is it?", "colour", "big"),
        ("What is it made of?", "other", "big"),
        ("How many?", "other", "big"),
    ]
    assert items[0].models == (("question_writer", "big: m-1"),)
    assert sizes(stub.bodies[0]) == [(140, 100)]
    assert "up to 4 short questions" in text_of(stub.bodies[0])


@pytest.mark.parametrize("reply", ["", "no", "[broken", '{"question": "a"}', "[]"])
def test_a_writer_without_questions_refuses_the_place(tmp_path, reply):
    with behind(tmp_path, always(reply)) as (client, stub):
        (item,) = ask_step(role(client, by_endpoint.write_questions), VIEWS)(EMPTY)
    assert item.decisions[-1].reason == "no question about this place"
    assert [body["seed"] for body in stub.bodies] == ([0] if reply == "[]" else [0, 1, 2])


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ({}, ""),
        ({"answerable": False, "unique": False}, "not answerable from the crop"),
        ({"unique": False}, "not unique in the whole picture"),
        ({"same_answer": False}, "another answer in the whole picture"),
        ({"clean": False}, "the question gives something away"),
        ({"unique": "yes"}, "the validator gave no usable verdict"),
    ],
)
def test_the_validator_compares_whole_and_crop(tmp_path, verdict, reason):
    whole = {"answerable": True, "unique": True, "same_answer": True, "clean": True} | verdict
    with behind(tmp_path, always(f"<think>[]</think>{json.dumps(whole)}")) as (client, stub):
        (item,) = validate_step(role(client, by_endpoint.validate), VIEWS)(ITEM)
    assert item.decisions[-1].reason == reason
    assert sizes(stub.bodies[0]) == [(400, 200), (140, 100)]
    assert json.dumps(ITEM.draft.text) in text_of(stub.bodies[0])
    assert "A4" not in json.dumps(stub.bodies[0]["messages"][0]["content"][2])


def test_a_refusal_or_leak_costs_the_item_only(tmp_path):
    with behind(tmp_path, always("{}")) as (client, stub):
        leaky = dataclasses.replace(ITEM, draft=dataclasses.replace(ITEM.draft, text="What is in the bounding box?"))
        (item,) = validate_step(role(client, by_endpoint.validate), VIEWS)(leaky)
    assert item.decisions[-1].reason == "the question points at the crop or a box"
    assert stub.bodies == []
    with behind(tmp_path, always((413, {}))) as (client, _):
        (draft,) = ask_step(role(client, by_endpoint.write_questions), VIEWS)(EMPTY)
        (checked,) = validate_step(role(client, by_endpoint.validate), VIEWS)(ITEM)
    assert draft.decisions[-1].reason == "the question writer refused the picture"
    assert checked.decisions[-1].reason == "the validator refused the picture"


def test_teachers_sample_the_crop_and_never_see_the_known_answer(tmp_path):
    replies = ["<answer>**A4**</answer>", "", "\\boxed{A} or \\boxed{B}", "I cannot tell"]
    with behind(tmp_path, lambda body, before: replies[body["seed"]]) as (client, stub):
        (item,) = answer_step((role(client, by_endpoint.answer),), VIEWS, 4)(ITEM)
    assert item.votes == (
        Vote("big", 0, "A4"),
        Vote("big", 1, "", "failed", "an empty answer"),
        Vote("big", 2, "", "failed", "several boxed values"),
        Vote("big", 3, "", "abstained"),
    )
    for body in stub.bodies:
        assert sizes(body) == [(140, 100)]
        assert "<answer>" in text_of(body)
        assert "A4" not in text_of(body)


def test_a_plain_teacher_gets_the_bare_question(tmp_path):
    with behind(tmp_path, always("A4")) as (client, stub):
        vote = role(client, by_endpoint.answer, plain=True).call(ITEM, VIEWS, 0)
    assert vote == Vote("big", 0, "A4")
    assert text_of(stub.bodies[0]) == ITEM.draft.text


def test_a_reply_that_is_cut_off_is_no_answer(tmp_path):
    from tests.llm.stub import completion

    with behind(tmp_path, always(completion("It says A", finish="length"))) as (client, _):
        vote = role(client, by_endpoint.answer).call(ITEM, VIEWS, 0)
    assert vote == Vote("big", 0, "", "failed", "cut off at the token limit")


def test_the_judge_says_yes_or_no_whatever_the_order(tmp_path):
    def answer(body: dict[str, Any], before: int) -> str:
        facts = json.loads(text_of(body))
        return {"maroon": "**Yes.**", "blue": "no", "odd": "perhaps"}[facts["second_answer"]]

    with behind(tmp_path, answer, "judge") as (client, stub):
        judge = Judge(client)
        assert judge.same("Q?", "dark red", "maroon") is True
        assert judge.same("Q?", "maroon", "dark red") is True
        assert judge.same("Q?", "azure", "blue") is False
        assert judge.same("Q?", "even", "odd") is None
    assert len(stub.bodies) == 3


def test_the_distractor_writer_writes_texts(tmp_path):
    answered = dataclasses.replace(ITEM, answer=Agreement("A4", 6, 8, ()))
    with behind(tmp_path, always('Sure: ["B1", 3, " C 2 ", ""]'), "distractor_writer") as (client, stub):
        assert role(client, by_endpoint.write_distractors).call(answered, VIEWS, 5) == ["B1", "C 2"]
        assert role(client, by_endpoint.write_distractors).call(ITEM, VIEWS, 5) == ()
    assert "5 wrong answers" in text_of(stub.bodies[0])


def test_the_reader_reads_with_and_without_a_picture(tmp_path):
    with behind(tmp_path, lambda body, before: "B" if before == 0 else "C", "student") as (client, stub):
        reader = role(client, by_endpoint.read, max_pixels=2000, plain=True)
        assert reader.call(ITEM, Image.new("RGB", (200, 100)), "Which?", 0).text == "B"
        assert reader.call(ITEM, None, "Which?", 0).text == "B"
    assert sizes(stub.bodies[0]) == [(63, 31)]
    assert stub.bodies[1]["messages"] == [{"role": "user", "content": "Which?"}]
    with behind(tmp_path / "b", always((422, {}))) as (client, _):
        vote = role(client, by_endpoint.read).call(ITEM, None, "Which?", 0)
    assert (vote.status, "HTTP 422" in vote.reason) == ("failed", True)
