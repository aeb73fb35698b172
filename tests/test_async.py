import asyncio
import threading
from typing import Any

import pytest

from qzoom import QZoom
from qzoom.errors import ConfigError, DeviceError, ImageError, QuestionError
from tests import tiny_models

PAGE = tiny_models.picture(41, 240, 170)
QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def model():
    return QZoom(tiny_models.engine("qwen3_vl"), "random")


def test_awaited_answers_and_streams_are_the_plain_ones(model):
    async def both() -> list[Any]:
        return await asyncio.gather(
            model.ask_async(PAGE, QUESTION, zoom="always", max_new_tokens=4),
            model.ask_async(PAGE, "When?", zoom="never", max_new_tokens=4),
        )

    first, second = asyncio.run(both())
    assert first == model.ask(PAGE, QUESTION, zoom="always", max_new_tokens=4)
    assert second == model.ask(PAGE, "When?", zoom="never", max_new_tokens=4)

    async def listen() -> list[Any]:
        return [event async for event in model.stream_async(PAGE, QUESTION, max_new_tokens=5, ignore_eos=True)]

    events = asyncio.run(listen())
    own = list(model.stream(PAGE, QUESTION, max_new_tokens=5, ignore_eos=True))
    assert [(event.kind, event.text) for event in events] == [(event.kind, event.text) for event in own]
    assert events[-1].answer == own[-1].answer


def test_errors_are_raised_where_they_are_awaited(model):
    with pytest.raises(ImageError, match="there is no such file"):
        asyncio.run(model.ask_async("nowhere.png", QUESTION))
    with pytest.raises(ConfigError, match="Unknown option 'zom'"):
        asyncio.run(model.ask_async(PAGE, QUESTION, zom="never"))


def workers() -> int:
    return sum(thread.name.startswith("qzoom-worker") for thread in threading.enumerate())


@pytest.mark.parametrize("how", ["cancel", "leave"])
def test_who_leaves_early_frees_the_thread(model, how):
    """An answer that would never end is given up, and the next question is answered."""
    before = workers()
    forever = {"max_new_tokens": 400, "ignore_eos": True, "zoom": "never"}

    async def run() -> Any:
        stream = model.stream_async(PAGE, QUESTION, **forever)
        if how == "leave":
            async for event in stream:
                if event.kind == "text":
                    break
            await stream.aclose()
        else:
            begun = asyncio.Event()

            async def consume() -> None:
                async for _ in stream:
                    begun.set()

            task = asyncio.create_task(consume())
            await begun.wait()
            waiting = asyncio.create_task(model.ask_async(PAGE, "When?", **forever))
            await asyncio.sleep(0)
            for each in (task, waiting):
                each.cancel()
            results = await asyncio.gather(task, waiting, return_exceptions=True)
            assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        return await model.ask_async(PAGE, QUESTION, max_new_tokens=2)

    assert asyncio.run(run()) == model.ask(PAGE, QUESTION, max_new_tokens=2)
    assert workers() <= before + 1


def test_a_chat_keeps_its_turns(model):
    session = model.session(PAGE, system="Be brief.")
    first = session.chat(QUESTION, zoom="never", max_new_tokens=4)
    second = session.chat("And the date?", zoom="never", max_new_tokens=4)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And the date?"},
    ]
    own = model.ask(PAGE, messages, zoom="never", max_new_tokens=4)
    assert (second.text, second.question) == (own.text, "And the date?")
    assert second.usage.prompt_tokens == own.usage.prompt_tokens
    assert second.usage.reused_tokens == first.usage.reused_tokens > 0
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"] * 2
    assert session.ask(QUESTION, zoom="never", max_new_tokens=4).text == first.text
    with pytest.raises(QuestionError):
        session.chat(" ")
    session.chat("More?", cancel=lambda: True)
    assert len(session.turns) == 4
    session.turns.clear()
    assert session.chat(QUESTION, zoom="never", max_new_tokens=4).text == first.text


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"torch_dtype": "float16"}, DeviceError, "float16 is hundreds of times slower on a CPU"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, ConfigError, "name the same option; give one of them"),
        ({"attn_implementation": "flash_attention_2"}, DeviceError, "runs on CUDA only, not on cpu; use 'sdpa'"),
        ({"attn_implementation": "flash_attention_3"}, DeviceError, "runs on CUDA only, not on cpu; use 'sdpa'"),
        ({"attn_implementation": "flash"}, ConfigError, "must be one of sdpa, eager, flash_attention_2"),
    ],
)
def test_options_as_transformers_writes_them(options, error, sentence):
    with pytest.raises(error, match=sentence):
        QZoom.from_pretrained("tiny", **options)


def test_torch_dtype_is_dtype():
    import torch

    model = QZoom.from_pretrained("tiny", torch_dtype=torch.float32)
    assert model.engine.backbone.model.dtype == torch.float32


def test_flash_attention_needs_its_package_and_half_precision():
    import torch

    from qzoom.checkpoints.base import check_flash

    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match="has no float32; load with dtype='bfloat16' or 'float16'"):
        check_flash("flash_attention_2", cuda, torch.float32)
    with pytest.raises(
        ConfigError, match="flash_attention_3 needs flash-attn-3, which is not installed or fits no GPU"
    ):
        check_flash("flash_attention_3", cuda, torch.bfloat16)
