"""Client libraries against `qzoom serve`, in an environment of their own: `make test-clients`.

Not collected by `make test`, which has neither these libraries nor a reason to install them. The programs of Node run
in the folder that NODE_FOLDER names, where their packages are installed.
"""

import asyncio
import base64
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pydantic
import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "examples" / "receipt.jpg"
URL = "data:image/jpeg;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
QUESTION = {"type": "text", "text": "What is the date?"}
PARTS = [{"type": "image_url", "image_url": {"url": URL}}, QUESTION]
TURN = {"role": "user", "content": PARTS}
AGAIN = {"role": "user", "content": "And the total amount?"}


class Page(pydantic.BaseModel):
    """The form of an answer."""

    date: str = pydantic.Field(max_length=12)
    kind: Literal["receipt", "page"]


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


@pytest.fixture
def client(base):
    import openai

    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def answer(client):
    return client.chat.completions.create(model="tiny", messages=[TURN]).choices[0].message


def test_openai_in_all_its_ways(client, base, answer):
    import openai

    create = client.chat.completions.create
    assert answer.content
    assert answer.qzoom["gate"]
    turns = [TURN, answer.model_dump(), AGAIN]
    assert create(model="tiny", messages=turns).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(model="tiny", messages=[TURN], stream=True)]
    assert "".join(pieces) == answer.content
    with client.chat.completions.stream(model="tiny", messages=[TURN]) as stream:
        assert stream.get_final_completion().choices[0].message.content == answer.content
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=[TURN])
    assert raw.parse().choices[0].message.content == answer.content
    assert client.models.retrieve("tiny").id == "tiny"

    async def ask():
        async with openai.AsyncOpenAI(base_url=base, api_key="none") as own:
            return await own.chat.completions.create(model="tiny", messages=[TURN])

    assert asyncio.run(ask()).choices[0].message.content == answer.content
    page = create(model="tiny", messages=[TURN], max_tokens=4096, n=2, logprobs=True, top_logprobs=2).choices
    assert [choice.message.content for choice in page] == [answer.content] * 2
    assert len(page[0].logprobs.content[0].top_logprobs) == 2
    parsed = client.chat.completions.parse(model="tiny", messages=[TURN], response_format=Page).choices[0].message
    assert parsed.parsed.kind in ("receipt", "page")
    assert create(model="tiny", messages=[TURN, parsed.model_dump(), AGAIN]).choices[0].message.content
    assert raw.headers["x-request-id"]


def test_openai_is_refused_in_words(client):
    import openai

    create = client.chat.completions.create
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        create(model="tiny", messages=[TURN], tools=[tool])
    for call in (client.responses.create, client.embeddings.create):
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            call(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.completions.create(model="tiny", prompt="x")


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_with_its_own_message_in_the_second_turn(base, provider):
    import litellm

    options = {"model": f"{provider}/tiny", "api_base": base, "api_key": "none"}
    first = litellm.completion(messages=[TURN], **options).choices[0].message
    assert first.content
    second = litellm.completion(messages=[TURN, first, AGAIN], **options).choices[0].message.content
    assert second
    chunks = list(litellm.completion(messages=[TURN], stream=True, **options))
    built = litellm.stream_chunk_builder(chunks, messages=[TURN]).choices[0].message
    assert built.content == first.content
    thought = {"role": "assistant", "content": first.content, "reasoning_content": "hm", "thinking_blocks": []}
    for turn in (built, thought):
        assert litellm.completion(messages=[TURN, turn, AGAIN], **options).choices[0].message.content == second
    text_url = {"role": "user", "content": [{"type": "image_url", "image_url": URL}, QUESTION]}
    marked = {"role": "user", "content": [PARTS[0], QUESTION | {"cache_control": {"type": "ephemeral"}}]}
    page = litellm.completion(messages=[TURN], response_format=Page, **options).choices[0].message.content
    assert Page.model_validate_json(page).kind in ("receipt", "page")
    for turn in (text_url, marked):
        assert litellm.completion(messages=[turn], **options).choices[0].message.content == first.content


def test_langchain_with_every_form_of_picture(base, answer):
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=base, api_key="none")
    data = URL.split(",")[1]
    for part in (
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image", "source_type": "base64", "data": data, "mime_type": "image/jpeg"},
        {"type": "image", "base64": data, "mime_type": "image/jpeg"},
    ):
        turn = HumanMessage(content=[part, QUESTION])
        first = chat.invoke([turn])
        assert first.content == answer.content
    assert first.usage_metadata["output_tokens"] > 0
    again = HumanMessage(content=AGAIN["content"])
    second = chat.invoke([turn, first, again]).content
    assert second
    thought = AIMessage(content=first.content, additional_kwargs={"reasoning_content": "hm"})
    assert chat.invoke([turn, thought, again]).content == second
    assert "".join(piece.content for piece in chat.stream([turn])) == answer.content
    assert [reply.content for reply in chat.batch([[turn], [turn]])] == [answer.content] * 2
    page = chat.with_structured_output(Page, method="json_schema").invoke([turn])
    assert page.kind in ("receipt", "page")
    assert chat.bind(logprobs=True).invoke([turn]).response_metadata["logprobs"]["content"]


def test_llama_index(base, answer):
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(model="tiny", api_base=base, api_key="none", is_chat_model=True, max_tokens=32)
    for block in (ImageBlock(image=PICTURE.read_bytes(), image_mimetype="image/jpeg"), ImageBlock(path=PICTURE)):
        turn = ChatMessage(role="user", blocks=[block, TextBlock(text=QUESTION["text"])])
        first = model.chat([turn]).message
        assert first.content == answer.content
    assert model.chat([turn, first, ChatMessage(role="user", content=AGAIN["content"])]).message.content
    assert "".join(piece.delta or "" for piece in model.stream_chat([turn])) == answer.content
    assert model.complete("What is this?").text


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is missing")
@pytest.mark.parametrize("program", ["openai.mjs", "ai_sdk.mjs"])
def test_node(base, program):
    text = (Path(__file__).parent / program).read_text()
    environment = os.environ | {"BASE": base, "PICTURE": str(PICTURE)}
    done = subprocess.run(
        ["node", "--input-type=module"], input=text, cwd=os.environ["NODE_FOLDER"], env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
