"""What may be sent, and what is said about the rest."""

import pytest

from qzoom.serving.errors import ApiError
from qzoom.serving.protocol import ChatRequest, PerceiveRequest, validate

BASE = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}]}
TEXT = {"type": "text", "text": "What?"}


def of(role, *parts):
    return {"messages": [{"role": role, "content": list(parts)}]}


def refusal(values, kind=ChatRequest):
    with pytest.raises(ApiError) as caught:
        validate(kind, BASE | values)
    assert caught.value.status == 400
    error = caught.value.body()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    "values",
    [
        {"n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "service_tier": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "tool_choice": "none"},
        {"temperature": 0, "top_p": 1, "stop": "x", "seed": -1, "stream": True},
        {"stop": ["x", "y"], "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"qzoom": {"zoom": "never", "gate_threshold": 0, "max_visual_tokens": 64, "heatmap": True}},
        {"max_completion_tokens": 3, "max_tokens": None, "temperature": None, "stop": None, "n": None, "qzoom": None},
        {"messages": [{"role": "developer", "content": [TEXT]}, {"role": "user", "content": [TEXT], "name": "a"}]},
        {"messages": [{"role": "assistant", "content": "No.", "refusal": None, "tool_calls": None, "qzoom": {"a": 1}}]},
    ],
)
def test_what_openai_clients_send_is_taken(values):
    assert validate(ChatRequest, BASE | values).model == "tiny"


@pytest.mark.parametrize(
    ("values", "param", "part"),
    [
        ({"max_token": 3}, "max_token", "Unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"qzoom": {"zom": "never"}}, "qzoom.zom", "did you mean 'zoom'?"),
        ({"<x>": 1}, "<x>", "Unknown field '<x>'"),
        ({"messages": [{"role": "user", "content": [TEXT | {"cache": 1}]}]}, "messages[0].content[0].cache", "'cache'"),
        ({"n": 2}, "n", "one answer per request"),
        ({"n": True}, "n", "one answer per request"),
        ({"logprobs": True}, "logprobs", "no log probabilities"),
        ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
        ({"audio": {"voice": "x"}}, "audio", "neither hears nor speaks"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "plain text"),
        ({"presence_penalty": 0.5}, "presence_penalty", "no penalties"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "odds of tokens"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "x"}, "messages", "list"),
        ({"messages": [1]}, "messages[0]", "role system, developer, user or assistant"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "no tools here"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a text or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "audio, video and files are not read",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://a"}]}]},
            "messages[0].content[0].image_url",
            "must be an object",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "", "detail": "x"}}]}
                ]
            },
            "messages[0].content[0].image_url.detail",
            "'low', 'auto', 'high' or 'original'",
        ),
        (
            of("system", {"type": "image_url"}),
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal to"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stop": [""]}, "stop[0]", "must not be empty"),
        ({"stop": 5}, "stop", "a text or a list of texts"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"qzoom": {"zoom": "maybe"}}, "qzoom.zoom", "'auto', 'never' or 'always'"),
        ({"qzoom": {"gate_threshold": 2}}, "qzoom.gate_threshold", "less than or equal to 1"),
        ({"model": None}, "model", "string"),
    ],
)
def test_a_refusal_names_the_field_and_what_to_do(values, param, part):
    error = refusal(values)
    assert error["param"] == param
    assert part in error["message"]


def test_a_missing_model_is_said_to_be_missing():
    with pytest.raises(ApiError, match="model: it is missing"):
        validate(ChatRequest, {"messages": BASE["messages"]})


def test_perceive_takes_no_sampling():
    assert refusal({"temperature": 0}, PerceiveRequest)["code"] == "unknown_field"


def test_values_are_not_echoed():
    assert "secret" not in refusal({"temperature": "secret" * 50})["message"]
