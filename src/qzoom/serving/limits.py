"""What one request may cost: `ServerLimits`, and the checks that run before anything is decoded.

The order for a request: connections and headers (`server`), size and time of the body (`middleware`), `read_payload`,
`check_tokens`, base64 decoding or fetching, `check_pictures` (headers only), and at last the picture decoder with
`ServerLimits.image_limits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic_core import from_json

from qzoom.images.decode import picture_size
from qzoom.images.limits import ImageLimits
from qzoom.serving.errors import ApiError
from qzoom.settings import Between, settings

__all__ = ["Seconds", "ServerLimits", "body_too_large", "check_pictures", "check_tokens", "read_payload"]

_MIB = 2**20
Count = Annotated[int, Between(1, 2**40)]
Seconds = Annotated[float, Between(0.001, 86_400)]


@settings
class ServerLimits:
    """Limits of one server; the defaults suit one that strangers may reach."""

    body_bytes: Count = 32 * _MIB
    """Bytes of a request body."""
    messages: Count = 64
    """Chat messages per request."""
    parts: Count = 128
    """Content parts per request, all messages together."""
    text_chars: Count = 65_536
    """Characters of text per request, all messages together."""
    pictures: Count = 8
    """Pictures per request."""
    picture_bytes: Count = 16 * _MIB
    """Bytes of one encoded picture, before base64."""
    total_picture_bytes: Count = 24 * _MIB
    """Bytes of all encoded pictures of a request."""
    picture_pixels: Count = 50_000_000
    """Width x height of one picture."""
    total_pixels: Count = 100_000_000
    """Pixels of all pictures of a request."""
    max_new_tokens: Count = 1024
    """Tokens of one answer."""
    visual_tokens: Count = 16_384
    """Most visual tokens that a request may ask for."""
    reading: Count = 32
    """Requests whose body is received or whose pictures are decoded at the same time; others wait."""
    connections: Count = 1024
    """Open connections; one more is answered with 503."""
    header_timeout_s: Seconds = 10.0
    """Seconds that request line and headers may take."""
    body_timeout_s: Seconds = 60.0
    """Seconds that the whole body may take, the wait for a slot included."""

    @property
    def json_values(self) -> int:
        """Most brackets, commas and colons of a body: those of its text and ample room for its structure."""
        return self.text_chars + 32 * (self.messages + self.parts) + 1024

    def image_limits(self) -> ImageLimits:
        """What the picture decoder is given."""
        return ImageLimits(max_pixels=self.picture_pixels, max_bytes=self.picture_bytes)


def read_payload(body: bytes, limits: ServerLimits) -> dict[str, Any]:
    """Parse a request body and check all that can be counted without decoding or fetching a picture.

    Args:
        body: the whole body.
        limits: the server's limits.

    Returns:
        The JSON object: bounded depth, no NaN, no halves of surrogate pairs. Types of fields are not checked.

    Raises:
        ApiError: status 400 for what is not such an object and for counts, 413 for too many bytes.
    """
    if len(body) > limits.body_bytes:
        raise body_too_large(limits)
    # Counted before parsing: a body of brackets would unpack to far more memory than it has bytes.
    if sum(body.count(mark) for mark in (b"{", b"[", b",", b":")) > limits.json_values:
        text = f"The body has more JSON values than the limit of about {limits.json_values}; send fewer."
        raise ApiError(400, text, code="too_many_values")
    try:
        payload = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        text = f"The body is not valid JSON: {str(error)[:200]}."
        raise ApiError(400, text, code="invalid_json") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "The body is not a JSON object; send {...}.", code="invalid_json")
    if isinstance(payload.get("messages"), list):
        _check_messages(payload["messages"], limits)
    return payload


def _check_messages(messages: list[Any], limits: ServerLimits) -> None:
    """Refuse messages beyond the counts and sizes; other shapes than messages with parts are left to `protocol`."""
    _check_count(len(messages), limits.messages, "messages", "too_many_messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    parts = [p for content in contents if isinstance(content, list) for p in content if isinstance(p, dict)]
    count = sum(len(content) for content in contents if isinstance(content, list))
    _check_count(count, limits.parts, "content parts", "too_many_parts")
    texts = [text for text in [*contents, *(part.get("text") for part in parts)] if isinstance(text, str)]
    _check_count(sum(map(len, texts)), limits.text_chars, "characters of text", "text_too_long")
    urls = [_url(part) for part in parts if "image_url" in part or part.get("type") == "image_url"]
    _check_count(len(urls), limits.pictures, "pictures", "too_many_images")
    sizes = [_base64_bytes(url) for url in urls]
    for number, size in enumerate(sizes, start=1):
        if size > limits.picture_bytes:
            text = f"Picture {number} is larger than the limit of {_mib(limits.picture_bytes)}; compress or shrink it."
            raise ApiError(413, text, param="messages", code="image_too_large")
    _check_total(sum(sizes), limits)


def check_tokens(max_new_tokens: int | None, max_visual_tokens: int | None, limits: ServerLimits) -> None:
    """Refuse token budgets above the server's ceilings; None asks for nothing.

    Raises:
        ApiError: status 400.
    """
    for name, value, most in (
        ("max_tokens", max_new_tokens, limits.max_new_tokens),
        ("qzoom.max_visual_tokens", max_visual_tokens, limits.visual_tokens),
    ):
        if value is not None and value > most:
            text = f"{name} is above this server's limit of {most}; ask for less."
            raise ApiError(400, text, param=name, code="too_many_tokens")


def check_pictures(pictures: Sequence[bytes], limits: ServerLimits) -> None:
    """Refuse encoded pictures that together unpack to too much; only their headers are read.

    Args:
        pictures: the files' bytes, from data URLs or fetched.
        limits: the server's limits.

    Raises:
        ApiError: status 413, too many bytes or pixels together.
        ImageError: one of them is not a picture or is itself outside the limits.
    """
    _check_total(sum(map(len, pictures)), limits)
    own = limits.image_limits()
    pixels = 0
    for number, data in enumerate(pictures, start=1):
        width, height = picture_size(data, f"picture {number}", own)
        pixels += width * height
    if pixels > limits.total_pixels:
        most = f"{limits.total_pixels / 1e6:.4g} megapixels"
        text = f"The pictures have more pixels together than the limit of {most}; shrink them or send fewer."
        raise ApiError(413, text, param="messages", code="too_many_pixels")


def body_too_large(limits: ServerLimits) -> ApiError:
    """The refusal of a body above `body_bytes`."""
    text = f"The body is larger than the limit of {_mib(limits.body_bytes)}; send smaller or fewer pictures."
    return ApiError(413, text, code="body_too_large")


def _check_count(count: int, most: int, what: str, code: str) -> None:
    if count > most:
        text = f"The request has {count} {what}, above the limit of {most}; send less."
        raise ApiError(400, text, param="messages", code=code)


def _check_total(size: int, limits: ServerLimits) -> None:
    if size > limits.total_picture_bytes:
        most = _mib(limits.total_picture_bytes)
        text = f"The pictures have more bytes together than the limit of {most}; shrink them or send fewer."
        raise ApiError(413, text, param="messages", code="images_too_large")


def _url(part: dict[str, Any]) -> str:
    """The address in an image part; "" for one of another shape."""
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    return url if isinstance(url, str) else ""


def _base64_bytes(url: str) -> int:
    """Least bytes that a data URL decodes to, from its length; 0 for other addresses."""
    if url[:5].lower() != "data:":
        return 0
    return max(0, (len(url) - url.find(",") - 1) // 4 * 3 - 2)


def _mib(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"
