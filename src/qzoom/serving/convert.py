"""A checked request to what the model takes: pictures decoded, `detail` and `qzoom` turned into options.

All of it blocks (base64, network, decoding), so it runs in a pool of threads, never on the event loop.

Decoded pictures of earlier requests: a file that comes again is neither unpacked nor hashed pixel by pixel again.

Whoever asks has sent the bytes and had them checked against the limits, as if there were no cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qzoom.config import TokenBudget
from qzoom.engine.lru import LRUCache
from qzoom.engine.request import Request, share_tokens
from qzoom.errors import BudgetError, ImageError
from qzoom.images.fetch import FetchPolicy, fetch_image
from qzoom.images.limits import ImageLimits
from qzoom.images.load import LoadedImage, load_image, pixel_digest, read_data_url
from qzoom.model import QZoom
from qzoom.serving.errors import ApiError, from_exception
from qzoom.serving.limits import ServerLimits, check_pictures, check_tokens
from qzoom.serving.protocol import ChatRequest, ImagePart, Message, PerceiveRequest, ZoomControls
from qzoom.types import ZoomMode

__all__ = ["Converter", "PictureCache", "image_parts", "most_demanding"]


Asked = ChatRequest | PerceiveRequest
_DETAILS = ("low", "auto", "high", "original")
_MODES: dict[str, ZoomMode] = {"low": "never", "auto": "auto", "high": "always", "original": "always"}


@dataclass(frozen=True, slots=True)
class Converter:
    """Makes the engine's requests for one model.

    Args:
        model: whose limits and tokenizer count.
        limits: ceilings of the server.
        fetch: which hosts pictures may come from.
        on_rejected: called with a short reason for every picture that is refused.
        cache: decodes pictures and keeps them.
    """

    model: QZoom
    limits: ServerLimits
    fetch: FetchPolicy
    on_rejected: Callable[[str], None]
    cache: PictureCache

    def request(self, asked: Asked, tenant: str = "") -> Request:
        """Read the pictures and tokenise.

        Args:
            asked: what the client sent.
            tenant: decoded pictures are shared within a tenant only.

        Raises:
            QZoomError: a picture, a text or an option that cannot be used.
        """
        options = self._options(asked)
        parts = [part for _, part in image_parts(asked.messages)]
        try:
            pictures = self._pictures(asked.messages, tenant)
        except (ApiError, ImageError) as error:
            self.on_rejected(from_exception(error).code)
            raise
        given = dict(zip(map(id, parts), pictures, strict=True))
        return self.model.request(None, [_message(message, given) for message in asked.messages], **options)

    def must_fetch(self, asked: Asked) -> bool:
        """Whether pictures come over the network, so that reading them may take long."""
        return any(part.image_url.url[:5].lower() != "data:" for _, part in image_parts(asked.messages))

    def _pictures(self, messages: Sequence[Message], tenant: str) -> list[LoadedImage]:
        found = list(image_parts(messages))
        files: list[bytes] = []
        for where, part in found:
            with _blaming(where):
                files.append(self._read(part.image_url.url, self.limits.total_picture_bytes - sum(map(len, files))))
                check_pictures(files[-1:], self.limits)
        check_pictures(files, self.limits)
        own = self.limits.image_limits()
        pictures = []
        for (where, _), data in zip(found, files, strict=True):
            with _blaming(where):
                pictures.append(self.cache.load(data, own, tenant))
        return pictures

    def _read(self, url: str, left_bytes: int) -> bytes:
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return read_data_url(url, self.limits.image_limits())
        if scheme.startswith(("http:", "https:")):
            most = max(1, min(self.fetch.max_bytes, self.limits.picture_bytes, left_bytes))
            return fetch_image(url, replace(self.fetch, max_bytes=most))
        raise ImageError(
            "Cannot read the picture: it is neither a data URL nor http(s); write data:image/png;base64,<data>."
        )

    def _options(self, asked: Asked) -> dict[str, Any]:
        controls = asked.qzoom or ZoomControls()
        answer_tokens = _answer_tokens(asked) if isinstance(asked, ChatRequest) else None
        check_tokens(answer_tokens, controls.max_visual_tokens, self.limits)
        detail = most_demanding(part.image_url.detail for _, part in image_parts(asked.messages))
        zoom = controls.zoom or _MODES[detail]
        if zoom == "auto" and not self.model.has_region:
            zoom = "never"
        largest = detail == "original" and controls.zoom is None and controls.max_visual_tokens is None
        count = sum(1 for _ in image_parts(asked.messages))
        coarse, region = self._budgets(zoom, count, controls.max_visual_tokens, largest)
        options: dict[str, Any] = {
            "zoom": zoom,
            "gate_threshold": controls.gate_threshold,
            "region_threshold": controls.region_threshold,
            "coarse_tokens": coarse,
            "region_tokens": region,
        }
        if isinstance(asked, ChatRequest):
            options |= _sampling(asked, answer_tokens, self.limits)
        return options

    def _budgets(
        self, zoom: ZoomMode, pictures: int, total: int | None, largest: bool
    ) -> tuple[TokenBudget | None, TokenBudget | None]:
        """Limits of the coarse look at each picture and of all regions together; None keeps the checkpoint's own.

        Where even those could exceed the server's ceiling, the ceiling is shared like a total of the client's.
        """
        if pictures == 0:
            return None, None
        config, default = self.model.config, self.model.engine.backbone.default_budget()
        coarse = config.coarse_tokens or default
        region = config.region_tokens or coarse
        spare = self.limits.visual_tokens - pictures * coarse.max_tokens
        if largest:
            most = min(default.max_tokens, max(spare, 1))
            region = TokenBudget(region.min_tokens, max(region.max_tokens, most))
        if total is None and spare >= (0 if zoom == "never" else region.max_tokens):
            return None, region if largest else None
        first, second = share_tokens(zoom, config, default, total=total or self.limits.visual_tokens)
        most = (first or coarse).max_tokens // pictures
        if total is None:
            most = min(most, coarse.max_tokens)
            second = second and _cut(second, min(second.max_tokens, region.max_tokens))
        if most < 1:
            raise BudgetError(f"max_visual_tokens is too little for {pictures} pictures; allow {2 * pictures} or more.")
        return _cut(coarse, most), second


def _cut(budget: TokenBudget, most: int) -> TokenBudget:
    return TokenBudget(min(budget.min_tokens, most), most)


def image_parts(messages: Sequence[Message]) -> Iterator[tuple[str, ImagePart]]:
    """The pictures of a conversation in order, each with its place for error texts."""
    for i, message in enumerate(messages):
        if isinstance(message.content, list):
            for j, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield f"messages[{i}].content[{j}].image_url", part


def most_demanding(details: Iterator[str | None]) -> str:
    """The highest of low, auto, high, original; "auto" stands for none, and for no picture at all."""
    ranks = [_DETAILS.index(detail or "auto") for detail in details]
    return _DETAILS[max(ranks)] if ranks else "auto"


def _message(message: Message, pictures: dict[int, LoadedImage]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": pictures[id(part)]}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": role, "content": parts}


def _answer_tokens(asked: ChatRequest) -> int | None:
    return asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens


def _sampling(asked: ChatRequest, tokens: int | None, limits: ServerLimits) -> dict[str, Any]:
    """Decoding options; what is not said keeps the library's own default."""
    given: dict[str, Any] = {
        "max_new_tokens": min(128, limits.max_new_tokens) if tokens is None else tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "stop": asked.stop,
        "seed": asked.seed,
        "ignore_eos": asked.ignore_eos,
    }
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Adds the place of a picture to errors about it."""
    try:
        yield
    except ImageError as error:
        raise from_exception(error, where) from error


_DECODERS = 4
_PIXEL_BYTES = 4  # what Pillow takes for a pixel of an RGB picture


class PictureCache(LRUCache[LoadedImage]):
    """The most recently used pictures, by API key and SHA-256 of the encoded bytes. Safe to use from several threads.

    Args:
        max_bytes: memory of all pictures together; 0 keeps none.
        decoders: pictures that are unpacked at the same time, since each may take hundreds of megabytes.
    """

    def __init__(self, max_bytes: int, decoders: int = _DECODERS) -> None:
        super().__init__(max_bytes, lambda picture: picture.size_px[0] * picture.size_px[1] * _PIXEL_BYTES)
        self._decoders = threading.BoundedSemaphore(decoders)

    def load(self, data: bytes, limits: ImageLimits, tenant: str) -> LoadedImage:
        """The picture, from memory or decoded.

        Args:
            data: the encoded bytes, already checked against the server's limits.
            limits: for the decoder.
            tenant: pictures are shared within a tenant only.

        Raises:
            ImageError: it cannot be decoded.
        """
        if not self.max_bytes:
            return self._decode(data, limits)
        digest = hashlib.sha256(tenant.encode() + b"\0")
        digest.update(data)
        key = digest.digest()
        found = self.get(key)
        if found is None:
            found = self._decode(data, limits)
            found = dataclasses.replace(found, digest=pixel_digest(found.image))
            self.put(key, found)
        return found

    def _decode(self, data: bytes, limits: ImageLimits) -> LoadedImage:
        with self._decoders:
            return load_image(data, limits)
