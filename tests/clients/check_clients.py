"""Client libraries against `qzoom serve`, in an environment of their own: `make test-clients`.

Not collected by `make test`, which has neither these libraries nor a reason to install them.
"""

import base64
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
URL = "data:image/jpeg;base64," + base64.b64encode((ROOT / "examples" / "receipt.jpg").read_bytes()).decode()
QUESTION = {"type": "text", "text": "What is the date?"}
PARTS = [{"type": "image_url", "image_url": {"url": URL}}, QUESTION]
AGAIN = {"role": "user", "content": "And the total amount?"}


@pytest.fixture(scope="session")
def base():
    """Address of a server of the embedded model; QZOOM names the command."""
    command = [os.environ.get("QZOOM", "qzoom"), "serve", "--port", "0", "--served-model-name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        line = process.stdout.readline()
        try:
            assert line.startswith("qzoom serves http"), line
            yield line.split()[-1] + "/v1"
        finally:
            process.terminate()


def test_openai(base):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=base, api_key="none")
    first = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": PARTS}])
    message = first.choices[0].message
    assert message.content
    turns = [{"role": "user", "content": PARTS}, message.model_dump(), AGAIN]
    assert client.chat.completions.create(model="tiny", messages=turns).choices[0].message.content


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_with_its_own_message_in_the_second_turn(base, provider):
    litellm = pytest.importorskip("litellm")
    options = {"model": f"{provider}/tiny", "api_base": base, "api_key": "none"}
    turns = [{"role": "user", "content": PARTS}]
    first = litellm.completion(messages=turns, **options).choices[0].message
    assert first.content
    assert litellm.completion(messages=[*turns, first, AGAIN], **options).choices[0].message.content
    marked = [{"role": "user", "content": [*PARTS[:1], QUESTION | {"cache_control": {"type": "ephemeral"}}]}]
    assert litellm.completion(messages=marked, **options).choices[0].message.content


def test_langchain_with_addresses_as_texts(base):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="tiny", base_url=base, api_key="none")
    turns = [{"role": "user", "content": [{"type": "image_url", "image_url": URL}, QUESTION]}]
    first = chat.invoke(turns)
    assert first.content
    assert chat.invoke([*turns, first, AGAIN]).content
