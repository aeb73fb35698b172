"""POST /v1/chat/completions with the stock client: what `QZoom.ask` says, in OpenAI's shape."""

import json

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.serving.running import chat, data_url, image_part, page, user

QUESTION = "What is the total amount?"
ASKS = [
    {"zoom": "auto"},
    {"zoom": "never"},
    {"zoom": "always"},
    {"zoom": "auto", "gate_threshold": 1.0},
    {"zoom": "auto", "gate_threshold": 0.0, "region_threshold": 0.2},
]


@pytest.fixture
def client(site):
    with OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def usage_of(answer):
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def check_record(record, answer):
    assert set(record) == {"gate", "regions", "image_sizes", "timing_ms", "heatmap"}
    assert record["gate"]["score"] == pytest.approx(answer.gate.score, abs=1e-4)
    assert (record["gate"]["threshold"], record["gate"]["zoomed"]) == (answer.gate.threshold, answer.gate.zoomed)
    assert [(r["box"], r["image"]) for r in record["regions"]] == [(list(r.box), r.image) for r in answer.regions]
    for found, own in zip(record["regions"], answer.regions, strict=True):
        assert found["score"] == pytest.approx(own.score, abs=1e-4)
    assert record["image_sizes"] == [list(size) for size in answer.image_sizes_px]
    assert all(ms >= 0 for ms in record["timing_ms"].values())


@pytest.mark.parametrize("controls", ASKS)
def test_a_whole_answer_equals_the_librarys(client, model, controls):
    own = model.ask(page(), QUESTION, max_new_tokens=8, **controls)
    reply = client.chat.completions.create(**chat(), extra_body={"qzoom": controls})
    assert reply.object == "chat.completion"
    assert reply.model == "tiny"
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
    check_record(choice.message.qzoom, own)
    assert choice.message.qzoom["heatmap"] is None
    found = reply.usage.model_dump()
    assert {name: found[name] for name in usage_of(own)} == usage_of(own)
    details = found["prompt_tokens_details"]
    assert (details["coarse_tokens"], details["region_tokens"]) == (own.usage.coarse_tokens, own.usage.region_tokens)
    assert details["image_tokens"] == own.usage.coarse_tokens + own.usage.region_tokens


@pytest.mark.parametrize("controls", ASKS[:3])
def test_a_stream_has_the_look_first_then_the_text_then_the_end(client, model, controls):
    own = model.ask(page(), QUESTION, max_new_tokens=8, **controls)
    stream = client.chat.completions.create(
        **chat(), stream=True, stream_options={"include_usage": True}, extra_body={"qzoom": controls}
    )
    first, *texts, last, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    check_record(first.choices[0].delta.qzoom, own)
    assert all(chunk.choices[0].delta.content for chunk in texts)
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == own.text
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *texts])
    assert last.choices[0].finish_reason == own.finish_reason
    assert last.choices[0].delta.content is None
    check_record(last.qzoom, own)
    assert usage.choices == []
    assert usage.usage.total_tokens == own.usage.prompt_tokens + own.usage.completion_tokens
    chunks = [first, *texts, last, usage]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_raw_stream_is_server_sent_events(site):
    with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=chat(stream=True), timeout=120) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        records = [part for part in "".join(reply.iter_text()).split("\n\n") if part]
    assert all(record.startswith("data: ") for record in records)
    assert records[-1] == "data: [DONE]"
    chunks = [json.loads(record[6:]) for record in records[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)  # it was not asked for


def test_the_clients_own_stream_helper_puts_the_answer_together(client, model):
    own = model.ask(page(), QUESTION, max_new_tokens=8)
    with client.chat.completions.stream(**chat()) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == own.text
    check_record(message.qzoom, own)


def test_the_heat_map_comes_when_asked_for(client, model):
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="always")
    body = {"qzoom": {"heatmap": True, "zoom": "always"}}
    reply = client.chat.completions.create(**chat(), extra_body=body)
    maps = reply.choices[0].message.qzoom["heatmap"]
    assert len(maps) == len(own.heat_maps) == 1
    assert [len(row) for row in maps[0]] == [own.heat_maps[0].values.shape[1]] * own.heat_maps[0].values.shape[0]
    for found, values in zip(maps[0], own.heat_maps[0].values.tolist(), strict=True):
        assert found == pytest.approx(values, abs=1e-4)


def test_several_turns_and_pictures_equal_the_librarys(client, model):
    pages = [page("A 1.00", (200, 260)), page("B 2.00", (260, 200))]
    own = model.ask(
        None,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": pages[0]}, {"type": "text", "text": "First?"}]},
            {"role": "assistant", "content": "1.00"},
            {"role": "user", "content": [{"type": "image", "image": pages[1]}, {"type": "text", "text": "Second?"}]},
        ],
        max_new_tokens=8,
    )
    reply = client.chat.completions.create(
        **chat(
            {"role": "system", "content": "Be brief."},
            user(image_part(data_url(pages[0])), "First?"),
            {"role": "assistant", "content": "1.00"},
            user(image_part(data_url(pages[1])), "Second?"),
        )
    )
    assert reply.choices[0].message.content == own.text
    check_record(reply.choices[0].message.qzoom, own)
    assert reply.choices[0].message.qzoom["image_sizes"] == [[200, 260], [260, 200]]


def test_sampling_with_a_seed_equals_the_librarys(client, model):
    more = {"temperature": 1.5, "top_p": 0.9, "seed": 11}
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="never", **more)
    reply = client.chat.completions.create(**chat(**more), extra_body={"qzoom": {"zoom": "never"}})
    assert reply.choices[0].message.content == own.text


def test_a_stop_text_ends_the_answer(client, model):
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="never")
    assert len(own.text) > 1, "the embedded model should say something"
    stop = own.text[1]
    reply = client.chat.completions.create(**chat(stop=stop), extra_body={"qzoom": {"zoom": "never"}})
    assert reply.choices[0].message.content == own.text.split(stop)[0]
    assert reply.choices[0].finish_reason == "stop"


def test_a_short_limit_is_said_to_be_the_reason(client):
    reply = client.chat.completions.create(**chat(max_tokens=1), extra_body={"qzoom": {"zoom": "never"}})
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 1)


def test_a_question_without_a_picture_is_answered(client, model):
    own = model.ask(None, [{"role": "user", "content": "What is this?"}], max_new_tokens=4)
    reply = client.chat.completions.create(model="tiny", messages=[user("What is this?")], max_tokens=4)
    assert reply.choices[0].message.content == own.text
    assert reply.choices[0].message.qzoom["regions"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_reach_the_client_as_its_own_errors(client, stream):
    with pytest.raises(NotFoundError) as missing:
        client.chat.completions.create(**(chat(stream=stream) | {"model": "gpt"}))
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as blank:
        client.chat.completions.create(**chat(user(image_part(), "  "), stream=stream))
    assert (blank.value.code, blank.value.param) == ("invalid_question", "messages")


def test_too_long_a_prompt_is_refused_with_a_status_also_when_streaming(client):
    with pytest.raises(BadRequestError, match="reads at most 4096"):
        client.chat.completions.create(**chat(user("word " * 9000), stream=True))
