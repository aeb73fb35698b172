import asyncio
import dataclasses
import json
import logging

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

import qzoom
from qzoom import QZoom
from qzoom.errors import ConfigError
from qzoom.serving import replies
from qzoom.serving.engines.native import NativeEngine
from qzoom.serving.service import Service
from qzoom.serving.settings import ServerSettings
from tests.serving.running import chat, data_url, image_part, page, running, user

QUESTION = "What is the total amount?"
ASKS = [
    {"zoom": "auto"},
    {"zoom": "never"},
    {"zoom": "always"},
    {"zoom": "auto", "gate_threshold": 1.0},
    {"zoom": "auto", "gate_threshold": 0.0, "region_threshold": 0.2},
]


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


def test_the_raw_stream_is_events_that_openais_helper_joins(site, client, model):
    with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=chat(stream=True), timeout=120) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        records = [part for part in "".join(reply.iter_text()).split("\n\n") if part]
    assert all(record.startswith("data: ") for record in records)
    assert records[-1] == "data: [DONE]"
    chunks = [json.loads(record[6:]) for record in records[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)  # it was not asked for
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


def test_sampling_and_stop_texts_equal_the_librarys(client, model):
    more = {"temperature": 1.5, "top_p": 0.9, "seed": 11}
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="never", **more)
    reply = client.chat.completions.create(**chat(**more), extra_body={"qzoom": {"zoom": "never"}})
    assert reply.choices[0].message.content == own.text
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="never")
    assert len(own.text) > 1, "the embedded model should say something"
    stop = own.text[1]
    reply = client.chat.completions.create(**chat(stop=stop), extra_body={"qzoom": {"zoom": "never"}})
    assert reply.choices[0].message.content == own.text.split(stop)[0]
    assert reply.choices[0].finish_reason == "stop"
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


def error_of(reply):
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_model_is_listed_with_what_it_can_do(site, model):
    with OpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
        listed = client.models.list().data
        single = client.models.retrieve("tiny")
    assert [card.id for card in listed] == ["tiny"]
    assert single == listed[0]
    assert single.max_model_len == model.engine.backbone.max_positions
    assert single.qzoom["gate_threshold"] == model.config.gate_threshold


def test_perceive_equals_the_librarys(http, model):
    own = model.perceive(page(), "What is the total amount?")
    body = chat()
    del body["max_tokens"]
    reply = http.post("/v1/perceive", json=body).json()
    assert reply["object"] == "qzoom.perception"
    assert reply["gate"]["score"] == pytest.approx(own.gate.score, abs=1e-4)
    assert reply["gate"]["zoomed"] == own.gate.zoomed
    assert [r["box"] for r in reply["regions"]] == [list(r.box) for r in own.regions]
    assert reply["usage"]["prompt_tokens"] == own.usage.prompt_tokens
    assert reply["usage"]["completion_tokens"] == 0
    rows = reply["heatmap"][0]
    assert (len(rows), len(rows[0])) == own.heat_maps[0].values.shape
    body["qzoom"] = {"heatmap": False}
    assert http.post("/v1/perceive", json=body).json()["heatmap"] is None


def samples(http):
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_count_what_happened(http, model):
    own = model.ask(page(), "What is the total amount?", max_new_tokens=8, zoom="always")
    before = samples(http)
    http.post("/v1/chat/completions", json=chat(qzoom={"zoom": "always"})).raise_for_status()
    assert http.post("/v1/chat/completions", json=chat(n=9)).status_code == 400
    after = samples(http)

    def grew(*key):
        return after[key] - before.get(key, 0)

    assert grew("qzoom:prompt_tokens_total") == own.usage.prompt_tokens
    assert grew("qzoom:generation_tokens_total") == own.usage.completion_tokens
    assert grew("qzoom:zoom_total", "zoom") == 1
    assert grew("qzoom:region_area_ratio_count") == len(own.regions)
    assert grew("qzoom:time_to_first_token_seconds_count") == 1
    assert grew("qzoom:e2e_request_latency_seconds_count") == 1
    assert grew("qzoom:requests_total", "200") == 1
    assert grew("qzoom:requests_total", "400") == 1
    assert after[("qzoom:num_requests_running",)] == after[("qzoom:num_requests_waiting",)] == 0
    assert grew("qzoom:prefix_cache_hits_total") + grew("qzoom:prefix_cache_misses_total") == 1


def test_the_document_and_the_page_are_served(http):
    document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/perceive", "/v1/models", "/health", "/ready", "/metrics", "/version"} < set(
        document["paths"]
    )
    post = document["paths"]["/v1/chat/completions"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert {"200", "400", "401", "413", "429", "503", "504"} <= set(post["responses"])
    reply = http.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert http.get("/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert http.get("/health").json() == {"status": "ok"}
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert http.get("/version").json() == {"version": qzoom.__version__}


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_server_without_heads_says_that_it_never_zooms(model, caplog, monkeypatch, with_heads):
    engine = model.engine if with_heads else dataclasses.replace(model.engine, region=None, gate=None)
    log = logging.getLogger("qzoom.serving")
    monkeypatch.setattr(log, "handlers", [caplog.handler])  # whatever earlier servers made of the log
    caplog.set_level("WARNING", log.name)
    settings = ServerSettings("tiny")
    service = Service(NativeEngine(QZoom(engine), settings), settings)
    service.start()
    asyncio.run(service.close())
    assert ("tiny has no region head: this server never zooms" in caplog.text) is not with_heads
    with running(QZoom(engine)) as site:
        card = httpx.get(f"{site.url}/v1/models").json()["data"][0]
        answer = httpx.post(f"{site.url}/v1/chat/completions", json=chat(), timeout=120).json()
    assert card["qzoom"]["zooms"] is with_heads
    assert with_heads or answer["choices"][0]["message"]["qzoom"]["regions"] == []


def test_head_is_get_without_the_body(http):
    for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/openapi.json", "/", "/app.js"):
        reply, whole = http.head(path), http.get(path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert reply.headers["content-type"] == whole.headers["content-type"]
    for path, status in (("/v1/nowhere", 404), ("/v1/models/x", 404), ("/v1/perceive", 405)):
        reply = http.head(path)
        assert (reply.status_code, reply.content) == (status, b"")
    assert [http.post("/health").headers["allow"], http.get("/v1/perceive").headers["allow"]] == ["GET, HEAD", "POST"]


def test_a_last_slash_does_not_lead_to_another_host(http):
    strange = {"Host": "other.example", "X-Forwarded-Proto": "https"}
    reply = http.post("/v1/chat/completions/", json=chat(max_tokens=1), headers=strange)
    assert reply.status_code == 200
    assert http.get("/v1/models/", headers=strange).json()["data"][0]["id"] == "tiny"
    for path in ("/v1//", "/nowhere/"):
        reply = http.get(path, headers=strange)
        assert reply.status_code == 404
        assert "location" not in reply.headers
        assert error_of(reply)["code"] == "not_found"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(http, encoding):
    headers = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    body = json.dumps(chat(max_tokens=1)).encode(encoding)
    assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


PREFLIGHT = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}


def test_other_origins_are_not_allowed_by_default(http):
    reply = http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [("https://app.example",), ("*",)])
def test_allowed_origins_may_read(model, origins):
    with running(model, api_keys=("key",), allowed_origins=origins) as site:
        address = f"{site.url}/v1/chat/completions"
        asked = httpx.options(address, headers=PREFLIGHT | {"Access-Control-Request-Headers": "authorization,x-a"})
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        assert asked.headers["access-control-allow-headers"] == "authorization,x-a"
        assert "POST" in asked.headers["access-control-allow-methods"]
        for key, status in (("key", 200), ("none", 401)):
            headers = {"Origin": "https://app.example", "Authorization": f"Bearer {key}"}
            reply = httpx.post(address, json=chat(max_tokens=1), headers=headers, timeout=120)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, "https://app.example")
        other = httpx.options(address, headers=PREFLIGHT | {"Origin": "https://other.example"})
        assert ("access-control-allow-origin" in other.headers) == (origins == ("*",))


@pytest.mark.parametrize("origin", ["", "app.example", "https://app.example/", "https://a b", "https://ä.example"])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(ConfigError, match="not an origin"):
        ServerSettings("tiny", allowed_origins=("https://app.example", origin))


def strict(text):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=no_constant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_leave_as_null_with_a_note(model, bad):
    answer = model.ask(page(), QUESTION, max_new_tokens=2, zoom="always")
    values = answer.heat_maps[0].values.copy()
    values[0, 0] = bad
    damaged = dataclasses.replace(
        answer,
        gate=dataclasses.replace(answer.gate, score=bad),
        regions=tuple(dataclasses.replace(region, score=bad) for region in answer.regions),
        heat_maps=(dataclasses.replace(answer.heat_maps[0], values=values),),
    )
    record = strict(json.dumps(replies.zoom_record(damaged, heatmap=True), allow_nan=False))
    assert record["gate"]["score"] is None
    assert record["regions"][0]["score"] is None
    assert record["heatmap"][0][0][0] is None
    assert any("not finite" in note for note in record["notes"])


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"temperature": 1.0}])
def test_an_answer_without_numbers_is_an_error(model, monkeypatch, more):
    head = type(model.engine.backbone).lm_logits
    monkeypatch.setattr(
        type(model.engine.backbone), "lm_logits", lambda self, hidden: head(self, hidden) * float("nan")
    )
    with running(model) as site:
        reply = httpx.post(f"{site.url}/v1/chat/completions", json=chat(**more), timeout=120)
        assert httpx.get(f"{site.url}/ready").status_code == 200
    if reply.status_code == 200:
        *_, error, done = [part.removeprefix("data: ") for part in reply.text.split("\n\n") if part]
        assert done == "[DONE]"
        assert strict(error)["error"]["code"] == "internal_error"
    else:
        assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"max_completion_tokens": 900}, "max_completion_tokens"),
        ({"max_tokens": 900}, "max_tokens"),
        ({"max_tokens": 900, "qzoom": {"max_visual_tokens": 500}}, "max_tokens or qzoom.max_visual_tokens"),
        ({"stream": True}, ""),
    ],
)
def test_too_long_a_prompt_names_what_was_sent(http, more, name):
    body = {"model": "tiny", "messages": [user("word " * 9000)]} | more
    reply = http.post("/v1/chat/completions", json=body)
    error = error_of(reply)
    assert (reply.status_code, error["param"]) == (400, "messages")
    assert "reads at most 4096" in error["message"]
    assert error["message"].endswith(f"shorten the messages or lower {name}." if name else "shorten the messages.")


def test_too_long_a_prompt_without_an_answer_names_no_answer(http):
    error = error_of(http.post("/v1/perceive", json={"model": "tiny", "messages": [user("word " * 9000)]}))
    assert "answer" not in error["message"]
    assert error["message"].endswith("tokens, but the model reads at most 4096; shorten the messages.")
