import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.serving.running import chat


@pytest.fixture
def served():
    process = subprocess.Popen(
        [sys.executable, "-m", "qzoom", "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"QZOOM_API_KEY": "the-key"},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_it_says_its_address_answers_curl_and_ends_well(served):
    found = re.fullmatch(r"qzoom serves (http://127\.0\.0\.1:\d+)\n", served.stdout.readline())
    assert found
    words = ["curl", "-s", "-S", f"{found[1]}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
    body = json.dumps(chat())
    done = subprocess.run(words, input=body, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout)["error"]["code"] == "invalid_api_key"
    words += ["-H", "Authorization: Bearer the-key"]
    done = subprocess.run(words, input=body, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["qzoom"]["image_sizes"] == [[320, 400]]
    served.send_signal(signal.SIGTERM)
    out, err = served.communicate(timeout=120)
    assert served.returncode == 0
    assert out == ""
    assert "the-key" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--limit", "pictures"], "NAME=NUMBER"), (["--port", "70000"], "--port"), (["--dtype", "float64"], "--dtype")],
)
def test_wrong_usage_has_code_2(here, words, part):
    result = here("serve", *words)
    assert result.code == 2
    assert part in result.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--limit", "picture=3"], "did you mean 'pictures'?"),
        (["--limit", "pictures=nan"], "--limit pictures must be a whole number"),
        (["--api-key", ""], "API key 1 is empty"),
        (["--allowed-media-domains", "http://x/"], "is not a host"),
        (["--allowed-origins", "app.example"], "is not an origin"),
    ],
)
def test_settings_that_cannot_be_used_are_one_sentence(here, words, part):
    here("serve", "--port", "0", *words).refuses(2, part)


@pytest.mark.parametrize("value", ["", " ", ",", "\n"])
def test_an_empty_key_variable_does_not_open_the_server(here, monkeypatch, value):
    monkeypatch.setenv("QZOOM_API_KEY", value)
    here("serve", "--port", "0").refuses(2, "QZOOM_API_KEY is set but empty")


@pytest.mark.parametrize("variable", ["QZOOM_ENGINE_KEY", "QZOOM_ANSWER_KEY", "QZOOM_API_KEY"])
def test_keys_that_no_header_carries_are_one_sentence(here, monkeypatch, variable):
    monkeypatch.setenv(variable, "sk-\N{HORIZONTAL ELLIPSIS}")
    address = "http://127.0.0.1:9"
    words = {
        "QZOOM_ENGINE_KEY": ("--engine-url", address),
        "QZOOM_ANSWER_KEY": ("--answer-url", address, "--answer-model", "m"),
        "QZOOM_API_KEY": (),
    }[variable]
    said = "API key 1" if variable == "QZOOM_API_KEY" else f"The key in {variable} has characters"
    result = here("serve", "--port", "0", *words)
    assert result.code == (2 if variable == "QZOOM_API_KEY" else 1)
    assert said in result.err
    assert "Traceback" not in result.err
