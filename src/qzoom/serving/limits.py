"""What one request may cost: `ServerLimits`, and the checks that run before anything is decoded.

The order for a request: the limits of connections and bodies (`connections`, `guard`), `read_payload`,
`check_tokens`, base64 decoding or fetching, `check_pictures` (headers only), and at last the picture
decoder with `ServerLimits.image_limits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qzoom.errors import ConfigError
from qzoom.images.limits import ImageLimits
from qzoom.serving.errors import ApiError

__all__ = [
    "ServerLimits",
    "body_too_large",
    "check_body",
    "check_messages",
    "check_pictures",
    "check_tokens",
    "read_payload",
]

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of one server; the defaults suit one that strangers may reach.

    Args:
        body_bytes: bytes of a request body.
        messages: chat messages per request.
        parts: content parts per request, all messages together.
        text_chars: characters of text per request, all messages together.
        pictures: pictures per request.
        picture_bytes: bytes of one encoded picture (before base64).
        total_picture_bytes: bytes of all encoded pictures of a request.
        picture_pixels: width x height of one picture.
        total_pixels: pixels of all pictures of a request.
        max_new_tokens: tokens of one answer.
        visual_tokens: most visual tokens that a request may ask for.
        reading: requests whose body is received or whose pictures are decoded at the same time; others wait.
        connections: open connections; one more is turned away with 503.
        header_timeout_s: seconds that request line and headers may take.
        body_timeout_s: seconds that the whole body may take, the wait for a place included.

    Raises:
        ConfigError: a limit that is not a number or below its least useful value.
    """

    body_bytes: int = 32 * _MIB
    messages: int = 64
    parts: int = 128
    text_chars: int = 65_536
    pictures: int = 8
    picture_bytes: int = 16 * _MIB
    total_picture_bytes: int = 24 * _MIB
    picture_pixels: int = 50_000_000
    total_pixels: int = 100_000_000
    max_new_tokens: int = 1024
    visual_tokens: int = 16_384
    reading: int = 32
    connections: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            seconds = field.name.endswith("_s")
            kind: Any = int | float if seconds else int
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not good or not (0 < value <= 86_400 if seconds else 1 <= value <= 2**40):
                what = "seconds above 0, at most a day" if seconds else "a whole number of at least 1"
                raise ConfigError(f"ServerLimits.{field.name} must be {what}, not {value!r}.")

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
    from pydantic_core import from_json

    check_body(body, limits)
    try:
        payload = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        text = f"The body is not valid JSON: {str(error)[:200]}."
        raise ApiError(400, text, code="invalid_json") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "The body is not a JSON object; send {...}.", code="invalid_json")
    check_messages(payload, limits)
    return payload


def check_body(body: bytes, limits: ServerLimits) -> None:
    """Refuse a body that is too large, or whose JSON would unpack to far more memory than it has bytes.

    Args:
        body: the whole body, not parsed yet.
        limits: the server's limits.

    Raises:
        ApiError: status 413 for bytes, 400 for JSON values.
    """
    if len(body) > limits.body_bytes:
        raise body_too_large(limits)
    if sum(body.count(mark) for mark in (b"{", b"[", b",", b":")) > limits.json_values:
        text = f"The body has more JSON values than the limit of about {limits.json_values}; send fewer."
        raise ApiError(400, text, code="too_many_values")


def check_messages(payload: Any, limits: ServerLimits) -> None:
    """Refuse messages beyond the counts and sizes; nothing is decoded or fetched.

    Args:
        payload: the parsed body, its types not checked yet; other shapes than messages with parts are left to the
            protocol's own errors.
        limits: the server's limits.

    Raises:
        ApiError: status 400 for counts, 413 for encoded pictures with too many bytes.
    """
    messages = payload.get("messages") if isinstance(payload, dict) else None
    if not isinstance(messages, list):
        return
    _check_count(len(messages), limits.messages, "messages", "too_many_messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    parts = [p for content in contents if isinstance(content, list) for p in content]
    _check_count(len(parts), limits.parts, "content parts", "too_many_parts")
    texts = [c for c in contents if isinstance(c, str)] + [p["text"] for p in parts if _is_text(p)]
    _check_count(sum(map(len, texts)), limits.text_chars, "characters of text", "text_too_long")
    urls = [url for part in parts if (url := _url(part)) is not None]
    _check_count(len(urls), limits.pictures, "pictures", "too_many_images")
    sizes = [_base64_bytes(url) for url in urls]
    for number, size in enumerate(sizes, start=1):
        if size > limits.picture_bytes:
            text = f"Picture {number} is larger than the limit of {_mib(limits.picture_bytes)}; compress or shrink it."
            raise ApiError(413, text, param="messages", code="image_too_large")
    if sum(sizes) > limits.total_picture_bytes:
        raise _pictures_too_large(limits)


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
    from qzoom.images.decode import picture_size

    if sum(len(data) for data in pictures) > limits.total_picture_bytes:
        raise _pictures_too_large(limits)
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


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _url(part: Any) -> str | None:
    """The address in an image part; "" for an image part of another shape, None for other parts."""
    if not isinstance(part, dict) or ("image_url" not in part and part.get("type") != "image_url"):
        return None
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    return url if isinstance(url, str) else ""


def _base64_bytes(url: str) -> int:
    """Least bytes that a data URL decodes to, from its length; 0 for other addresses."""
    if url[:5].lower() != "data:":
        return 0
    return max(0, (len(url) - url.find(",") - 1) // 4 * 3 - 2)


def _pictures_too_large(limits: ServerLimits) -> ApiError:
    most = _mib(limits.total_picture_bytes)
    text = f"The pictures have more bytes together than the limit of {most}; shrink them or send fewer."
    return ApiError(413, text, param="messages", code="images_too_large")


def _mib(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"
