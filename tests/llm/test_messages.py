"""What is sent and what a call is found by."""

from __future__ import annotations

import base64
import dataclasses
import io

import pytest
from PIL import Image

from qzoom.llm.client import ImagePart, Message, call_key, wire
from qzoom.llm.settings import EndpointSettings, Sampling

RED = Image.new("RGB", (40, 30), "red")


def chat(image: Image.Image = RED, text: str = "Q?", most: int = 10_000) -> list[Message]:
    return [Message("user", (ImagePart(image, most), text))]


def key(messages: list[Message], name: str = "one", sample: int = 0, sampling: Sampling | None = None, **extra) -> str:
    endpoint = EndpointSettings("http://x/v1", "m", extra_body=extra)
    return call_key(name, endpoint, messages, sampling or Sampling(), sample)


def test_pictures_go_as_png_with_that_media_type() -> None:
    (message,) = wire(chat())
    assert message["content"][1] == {"type": "text", "text": "Q?"}
    url = message["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "PNG"
        assert image.getpixel((5, 5)) == (255, 0, 0)
    assert wire([Message("system", ("Hello",))]) == [{"role": "system", "content": "Hello"}]


def test_large_pictures_are_scaled_down_in_shape() -> None:
    shown = ImagePart(Image.new("RGB", (4000, 1000), "blue"), 10_000)
    with Image.open(io.BytesIO(base64.b64decode(shown.url().partition(",")[2]))) as image:
        assert image.size == (200, 50)


def test_equal_content_is_one_call() -> None:
    palette = RED.convert("P", palette=Image.Palette.ADAPTIVE)
    assert key(chat()) == key(chat(RED.copy())) == key(chat(palette)) == key(chat(most=10**6))


@pytest.mark.parametrize(
    "other",
    [
        key(chat(text="Q!")),
        key(chat(Image.new("RGB", (40, 30), (255, 0, 1)))),
        key(chat(Image.new("RGB", (30, 40), "red"))),
        key(chat(most=500)),
        key(chat(), name="two"),
        key(chat(), sample=1),
        key(chat(), sampling=dataclasses.replace(Sampling(), temperature=0.8)),
        key(chat(), qzoom={"zoom": "never"}),
        key([Message("user", ("Q?",))]),
    ],
)
def test_anything_else_is_another(other: str) -> None:
    assert key(chat()) != other
