import codecs
import copy
import json

import pytest

from qzoom.serving.errors import ApiError
from qzoom.serving.fields import KNOWN
from qzoom.serving.protocol import ChatRequest, PerceiveRequest, read_payload, validate
from qzoom.serving.settings import ServerLimits

BASE = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}]}
TEXT = {"type": "text", "text": "What?"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://a"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PART = "messages[0].content[0]"


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
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"n": True}, "n", "whole number"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "of answers only"),
        ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
        ({"audio": {"voice": "x"}}, "audio", "neither hears nor speaks"),
        ({"response_format": {"type": "xml"}}, "response_format", '{"type": "json_object"}'),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"length_penalty": 0.5}, "length_penalty", "presence_penalty and frequency_penalty only"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "odds of tokens"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "x"}, "messages", "list"),
        ({"messages": [1]}, "messages[0]", "role system, developer, user or assistant"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "no tools here"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a text or a list of parts"),
        (of("user", {"type": "input_audio"}), PART, "audio and video are not read"),
        (of("user", {"type": "image_url", "image_url": 5}), f"{PART}.image_url", "must be an object"),
        (
            of("user", {"type": "image_url", "image_url": {"url": "", "detail": "x"}}),
            f"{PART}.image_url.detail",
            "'low', 'auto', 'high' or 'original'",
        ),
        (
            of("system", {"type": "image_url"}),
            f"{PART}.type",
            "it must be 'text' (pictures stand in turns of the user)",
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
        ({"repetition_penalty": 1.1}, "repetition_penalty", "set it to 1"),
        ({"min_p": 0.1}, "min_p", "set it to 0"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "no special tokens"),
        ({"stop_token_ids": [5]}, "stop_token_ids", "give 'stop'"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking", "template"),
        ({"guided_json": {}}, "guided_json", "'response_format' of type json_schema"),
        ({"best_of": 3}, "best_of", "set 'n'"),
        (of("user", TEXT) | {"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"messages": [{"role": "user", "content": "a", "reasoning": "b"}]}, "messages[0].reasoning", "assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls", "tools are not read"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}, *BASE["messages"]]},
            "messages[0].function_call",
            "calls of tools are not read",
        ),
    ],
)
def test_a_refusal_names_the_field_and_what_to_do(values, param, part):
    error = refusal(values)
    assert error["param"] == param
    assert part in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"reasoning_content": None, "reasoning_details": [{"type": "reasoning.text"}], "thinking_blocks": []},
        {"refusal": ""},
        {"provider_specific_fields": {"qzoom": {}}},
        {"annotations": [], "citations": None, "images": []},
        {"audio": None, "function_call": None, "tool_calls": None, "tool_call_id": None, "name": None, "id": "x"},
        {"tool_calls": []},
        {"cache_control": {"type": "ephemeral"}},
        {"content": None},
        {"content": None, "refusal": "I cannot."},
        {"content": [{"type": "refusal", "refusal": "I cannot."}]},
        {"content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, TEXT]},
    ],
)
def test_what_clients_add_to_an_answer_may_come_back(more):
    for kind in (ChatRequest, PerceiveRequest):
        turns = [*BASE["messages"], {"role": "assistant", "content": "7"} | more, *BASE["messages"]]
        assert len(validate(kind, BASE | {"messages": turns}).messages) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": -1},
        {"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "length_penalty": 1, "typical_p": 1.0, "min_tokens": 0},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
        {"stop_token_ids": None, "bad_words": [], "logits_processors": None, "allowed_token_ids": None},
        {"stop_token_ids": [], "stop": [], "logit_bias": {}, "best_of": 1, "use_beam_search": False, "echo": False},
        {"chat_template_kwargs": {}, "mm_processor_kwargs": None, "chat_template": None, "documents": None},
        {"chat_template_kwargs": {"enable_thinking": False}, "thinking": {"type": "disabled"}},
        {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False, "priority": 0},
        {"guided_json": None, "guided_regex": None, "structured_outputs": None, "prompt_logprobs": None},
        {"tools": None, "tool_choice": None, "functions": None, "function_call": None, "response_format": None},
        {"logit_bias": None, "audio": None, "prediction": None, "modalities": None, "web_search_options": None},
        {"stream": None, "stream_options": None, "seed": None, "user": None, "metadata": None, "logprobs": None},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": False}, "return_token_ids": False},
    ],
)
def test_wishes_for_what_happens_anyway_are_taken(values):
    assert validate(ChatRequest, BASE | values).model == "tiny"


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_known_field_may_be_null(name):
    assert validate(ChatRequest, BASE | {name: None}).model == "tiny"


@pytest.mark.parametrize("kind", [ChatRequest, PerceiveRequest])
def test_a_pictures_address_alone_is_enough(kind):
    for part in (IMAGE | {"image_url": "http://a"}, IMAGE | {"uuid": "x", "cache_control": {"type": "ephemeral"}}):
        assert validate(kind, BASE | of("user", TEXT, part)).messages[0].content[1].image_url.url == "http://a"
    address = {"url": "http://a", "format": "image/png", "uuid": "x", "detail": None}
    assert validate(kind, BASE | of("user", {"type": "image_url", "image_url": address})).messages
    assert validate(kind, BASE | of("user", TEXT | {"cache_control": {"type": "ephemeral"}})).messages


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": "http://a"},
        {"type": "image", "source": {"type": "base64", "data": ""}},
        {"type": "image", "image": "x"},
        {"type": "image_file", "image_file": {}},
        {"image_url": "http://a"},
    ],
)
def test_another_form_of_picture_is_shown_the_right_one(part):
    error = refusal(of("user", TEXT, part))
    assert error["param"] == "messages[0].content[1]"
    assert '{"type": "image_url", "image_url": {"url": "..."}}' in error["message"]


PLACES = {
    "": ((), "on top"),
    "qzoom": (("qzoom",), "into 'qzoom'"),
    "stream_options": (("stream_options",), "into 'stream_options'"),
    "messages[0]": (("messages", 0), "into a message"),
    "messages[0].content[0]": (("messages", 0, "content", 0), "into a part"),
    "messages[0].content[1]": (("messages", 0, "content", 1), "into a part"),
    "messages[0].content[1].image_url": (("messages", 0, "content", 1, "image_url"), "into 'image_url'"),
}
HOMES = {
    "on top": ["model", "messages", "temperature", "max_tokens", "stop", "stream", "response_format", "seed"],
    "into 'qzoom'": ["zoom", "gate_threshold", "max_visual_tokens", "heatmap"],
    "into 'image_url'": ["url", "detail"],
    "into 'stream_options'": ["include_usage"],
    "into a message": ["role"],
    "into a part": ["text"],
}


@pytest.mark.parametrize("param", PLACES)
def test_a_known_name_at_the_wrong_place_is_told_its_place(param):
    for name, home in ((name, home) for home, names in HOMES.items() if home != PLACES[param][1] for name in names):
        values = copy.deepcopy(of("user", TEXT, IMAGE) | {"stream": True, "stream_options": {}, "qzoom": {}})
        place = values
        for step in PLACES[param][0]:
            place = place[step]
        if name in place:  # the good request has it there
            continue
        place[name] = 1
        error = refusal(values)
        assert (error["param"], error["code"]) == (f"{param}.{name}".lstrip("."), "unknown_field")
        assert f"Unknown field {name!r}; it belongs {home}" in error["message"]


def test_unknown_names_are_told_what_was_meant():
    assert "did you mean 'heatmap', which belongs into 'qzoom'?" in refusal({"heat_map": True})["message"]
    assert "on top" in refusal({"extra_body": {"qzoom": {}}})["message"]
    for name in (
        "\uff4dodel",
        "model\u200b",
        "max_tok\u0435ns",
        "\u202eledom",
        "model ",
        "\U0001f642",
        "a\nb",
        "\x7f",
        "Model",
    ):
        error = refusal({name: 1})
        assert error["code"] == "unknown_field"
        assert ascii(name) in error["message"]


def test_missing_foreign_and_long_values():
    with pytest.raises(ApiError, match="model: it is missing"):
        validate(ChatRequest, {"messages": BASE["messages"]})
    assert refusal({"temperature": 0}, PerceiveRequest)["code"] == "unknown_field"
    assert "secret" not in refusal({"temperature": "secret" * 50})["message"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_of_unicode_are_read(encoding):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Größe?"}]}
    assert read_payload(json.dumps(body, ensure_ascii=False).encode(encoding), ServerLimits()) == body


@pytest.mark.parametrize(
    "raw", [codecs.BOM_UTF16_LE + b"\x00", codecs.BOM_UTF8 + b"\xff", codecs.BOM_UTF16_LE + b"\x00\xd8"]
)
def test_what_is_not_in_its_own_encoding_is_refused(raw):
    with pytest.raises(ApiError) as caught:
        read_payload(raw, ServerLimits())
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
