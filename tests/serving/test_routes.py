"""Every other address, and what is said where there is none."""

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

import qzoom
from tests.serving.running import chat, page


@pytest.fixture
def http(site):
    with httpx.Client(base_url=site.url, timeout=120) as found:
        yield found


def error_of(reply):
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_health_ready_and_version(http):
    assert http.get("/health").json() == {"status": "ok"}
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert http.get("/version").json() == {"version": qzoom.__version__}


def test_the_model_is_listed_with_what_it_can_do(site, model):
    with OpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
        listed = client.models.list().data
        single = client.models.retrieve("tiny")
    assert [card.id for card in listed] == ["tiny"]
    assert single == listed[0]
    assert single.max_model_len == model.engine.backbone.max_positions
    assert single.qzoom["gate_threshold"] == model.config.gate_threshold


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/page/../app.py", 404, "not_found"),
        ("GET", "/%2e%2e/app.py", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/perceive", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_allowed"),
    ],
)
def test_wrong_addresses_are_refused_in_openais_shape(http, method, path, status, code):
    reply = http.request(method, path)
    assert reply.status_code == status
    assert error_of(reply)["code"] == code


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"{}", "", 415, "unsupported_media_type"),
        (b"{}", "application/json; charset=utf-8", 400, "invalid_request"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/perceive"])
def test_bodies_that_are_not_json_objects_are_refused(http, path, body, kind, status, code):
    headers = {"Content-Type": kind} if kind else {}
    reply = http.post(path, content=body, headers=headers)
    assert reply.status_code == status
    assert error_of(reply)["code"] == code


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
    assert http.post("/v1/chat/completions", json=chat(n=3)).status_code == 400
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


def test_the_document_describes_every_address(http):
    document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/perceive", "/v1/models", "/health", "/ready", "/metrics", "/version"} < set(
        document["paths"]
    )
    post = document["paths"]["/v1/chat/completions"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert {"200", "400", "401", "413", "429", "503", "504"} <= set(post["responses"])


def test_the_page_is_served_with_a_strict_policy(http):
    reply = http.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert http.get("/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
