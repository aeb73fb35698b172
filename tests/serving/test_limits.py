import base64
import dataclasses
import io
import json

import pytest
from PIL import Image

from qzoom.errors import ConfigError, ImageError
from qzoom.images.limits import ImageLimits
from qzoom.serving.convert import check_tokens
from qzoom.serving.errors import ApiError
from qzoom.serving.pictures import PictureTotals
from qzoom.serving.protocol import ChatRequest, read_payload, validate
from qzoom.serving.settings import ServerLimits
from tests.serving.refusals import png_of

LIMITS = ServerLimits(
    body_bytes=100_000, messages=3, parts=4, text_chars=100, pictures=2, picture_bytes=3000, total_picture_bytes=4000,
    picture_pixels=1000, total_pixels=1500, max_new_tokens=10, visual_tokens=20,
)  # fmt: skip


def refusal(call, *args):
    with pytest.raises(ApiError) as caught:
        call(*args, LIMITS)
    assert str(caught.value).endswith(".")
    return caught.value


def body_of(*contents):
    return json.dumps({"messages": [{"role": "user", "content": content} for content in contents]}).encode()


def text(words):
    return {"type": "text", "text": words}


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(count):
    return "data:image/png;base64," + base64.b64encode(bytes(count)).decode()


def test_what_is_within_the_limits_comes_back_parsed():
    contents = ["x" * 40, [text("y" * 60), picture(data_url(3000)), picture(data_url(1000)), picture("ignored")][:3]]
    assert read_payload(body_of(*contents), LIMITS)["messages"][1]["content"] == contents[1]
    assert read_payload(b'{"a": [1, 2.5, "\xc3\xa4", null]}', LIMITS) == {"a": [1, 2.5, "ä", None]}


@pytest.mark.parametrize(
    ("contents", "status", "code"),
    [
        (["a"] * 4, 400, "too_many_messages"),
        ([[text("a")] * 3, [text("b")] * 2], 400, "too_many_parts"),
        (["x" * 60, "y" * 41], 400, "text_too_long"),
        (["x" * 60, [text("y" * 41)]], 400, "text_too_long"),
        ([[picture("a"), picture("b")], [picture("c")]], 400, "too_many_images"),
        ([[{"type": "image_url"}] * 3], 400, "too_many_images"),
        ([[{"image_url": 5}] * 3], 400, "too_many_images"),
        ([[{"image_url": "data:,"}] * 3], 400, "too_many_images"),
        ([[picture(data_url(3010))]], 413, "image_too_large"),
        ([[picture("DATA:," + "A" * 4100)]], 413, "image_too_large"),
        ([[picture("data:" + "A" * 4100)]], 413, "image_too_large"),
        ([[{"type": "image_url", "image_url": data_url(3010)}]], 413, "image_too_large"),
        ([[picture(data_url(2500))], [picture(data_url(1600))]], 413, "images_too_large"),
    ],
)
def test_counts_and_sizes(contents, status, code):
    error = refusal(read_payload, body_of(*contents))
    assert (error.status, error.code, error.param) == (status, code, "messages")


def test_sizes_are_told_from_the_length_of_the_base64_and_nothing_is_decoded():
    broken = "data:image/png;base64," + "!" * 3000
    assert read_payload(body_of([picture(broken)]), LIMITS)["messages"]
    assert refusal(read_payload, body_of([picture(broken + "!" * 3000)])).code == "image_too_large"
    assert read_payload(body_of("{[,:" * 25), LIMITS)["messages"]


@pytest.mark.parametrize("count", [0, 1, 2, 2998, 2999, 3000])
def test_no_picture_within_the_limit_is_refused_for_its_padding(count):
    padded = data_url(count)
    for url in (padded, padded.rstrip("=")):
        assert read_payload(body_of([picture(url)]), LIMITS)["messages"]


def test_many_parts_are_refused_before_they_are_parsed():
    for body in (
        b'{"messages": [{"content": [' + b'{"type": "text", "text": "a"},' * 1_000_000 + b"]}]}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"0," * 1_000_000 + b"0]",
    ):
        error = refusal(read_payload, body[: LIMITS.body_bytes])
        assert (error.status, error.code) == (400, "too_many_values")
        assert refusal(read_payload, body + bytes(100_000)).code == "body_too_large"


WHOLE = b'{"messages": [{"content": "a"}]}'
NOT_JSON = {
    "cut": [b"{", b"}", WHOLE[:-1], WHOLE[1:], WHOLE + b"x", WHOLE * 2, WHOLE.decode().encode("utf-16")[:-1]],
    "other values": [b"", b"[]", b"null", b"true", b"5", b'"text"', b"\x00", b"{'a': 1}", b'{"a": 1,}', b'{"a": "\n"}'],
    "other formats": [b"a=b&c=d", b"<xml/>", b"--x\r\nContent-Disposition: form-data\r\n\r\nx"],
    "no UTF-8": [b"\xff\xfe{}", b"\xff\xfe\x00", b"\xef\xbb\xbf{", b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}'],
    "half characters": [b'{"a": "\\ud800"}', b'{"a": "\\udc00\\ud800"}', b'{"\\ud83d": 1}'],
    "deep": [opening * 300 + b"1" + closing * 300 for opening, closing in ((b'{"a":', b"}"), (b"[", b"]"))],
    "long numbers": [b'{"a": ' + b"9" * 5000 + b"}"],
}


@pytest.mark.parametrize("kind", NOT_JSON)
def test_what_is_not_a_json_object(kind):
    for body in NOT_JSON[kind]:
        error = refusal(read_payload, body)
        assert (error.status, error.code, error.param) == (400, "invalid_json", None), body
        assert kind != "deep" or "recursion limit" in str(error)
    numbers = "NaN Infinity -Infinity nan 1e 01 .5 +1 0x1 0x10 1_0 1_000 --1 1."
    for value in numbers.split():
        assert "at line 1 column" in str(refusal(read_payload, f'{{"a": {value}}}'.encode())), value


@pytest.mark.parametrize(
    "payload",
    [
        {"messages": None}, {"messages": {"content": "x" * 1000}}, {"messages": "x"}, {"messages": [None, 5, "x"]},
        {"messages": [{"content": None}, {"content": {}}, {}]}, {"messages": [{"content": [None, 5, [], "x"]}]},
        {"messages": [{"content": [{"type": "text", "text": 5}, {"type": "image_url", "image_url": {"url": 5}}]}]},
    ],
)  # fmt: skip
def test_other_shapes_are_left_to_the_protocol(payload):
    assert read_payload(json.dumps(payload).encode(), LIMITS) == payload


def test_token_ceilings():
    def body(**more):
        return validate(ChatRequest, {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **more})

    check_tokens(body(), LIMITS)
    check_tokens(body(max_tokens=11), LIMITS, strict=False)
    check_tokens(body(max_tokens=10, qzoom={"max_visual_tokens": 20}), LIMITS)
    for name in ("max_tokens", "max_completion_tokens"):
        assert refusal(check_tokens, body(**{name: 11})).param == name
    assert refusal(check_tokens, body(qzoom={"max_visual_tokens": 21})).param == "qzoom.max_visual_tokens"


def png(width, height):
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def count(pictures, limits=LIMITS):
    totals = PictureTotals(limits)
    for number, data in enumerate(pictures, start=1):
        totals.add(data, number)
    return totals.pixels


def test_pixels_and_bytes_are_counted_on_the_headers():
    assert count([]) == 0
    assert count([png(30, 30), b"%PDF-1.7", png(30, 20)]) == 1500
    error = refusal(count, [png(30, 30), png(30, 21)])
    assert (error.status, error.code) == (413, "too_many_pixels")
    with pytest.raises(ImageError, match=r"picture 2: its 60000 x 60000 px"):
        count([png(10, 10), png_of(60_000, 60_000)])
    padded = png(10, 10) + bytes(2500)
    error = refusal(count, [padded, bytes(4001 - len(padded))])
    assert (error.status, error.code) == (413, "images_too_large")
    for data in (b"", b"GIF89a", b"not a picture", b"%!PS-Adobe", b"<svg/>"):
        with pytest.raises(ImageError, match="picture 1"):
            count([data])


def test_every_limit_is_validated_and_defaults_fit():
    for field in dataclasses.fields(ServerLimits):
        for value in (0, -1, True, "5", None, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=field.name):
                ServerLimits(**{field.name: value})
    with pytest.raises(ConfigError, match="pictures"):
        ServerLimits(pictures=1.5)
    assert ServerLimits(header_timeout_s=0.5).header_timeout_s == 0.5
    limits = ServerLimits()
    assert limits.body_bytes * 3 / 4 >= limits.picture_bytes
    assert limits.total_picture_bytes >= limits.picture_bytes
    assert limits.total_pixels >= limits.picture_pixels
    assert limits.parts >= limits.pictures
    assert LIMITS.image_limits() == ImageLimits(1000, 3000, max_pages=32, max_seconds=20)
