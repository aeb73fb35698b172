"""From a checked request body to the engine's request: pictures decoded, `detail` and `qzoom` turned into options.

All of it blocks (base64, network, decoding), so it runs in a pool of threads, never on the event loop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qzoom.config import TokenBudget
from qzoom.engine.cache import LRUCache
from qzoom.engine.grammar import ANY_OBJECT
from qzoom.engine.request import Request, share_tokens
from qzoom.errors import BudgetError, ImageError
from qzoom.images.decode import picture_size
from qzoom.images.fetch import FetchPolicy, fetch_image
from qzoom.images.limits import ImageLimits
from qzoom.images.load import LoadedImage, load_image, pixel_digest, read_data_url
from qzoom.model import QZoom
from qzoom.serving.errors import ApiError, from_exception, pictures_too_large
from qzoom.serving.protocol import (
    ChatRequest,
    ImageUrlPart,
    Message,
    ObjectFormat,
    PerceiveRequest,
    RefusalPart,
    SchemaFormat,
    TextPart,
    ZoomControls,
)
from qzoom.serving.settings import ServerLimits
from qzoom.types import ZoomMode

_DETAILS = ("low", "auto", "high", "original")
_MODES: dict[str, ZoomMode] = {"low": "never", "auto": "auto", "high": "always", "original": "always"}
_THINGS = {
    "the picture bytes": "{name}",
    "the data URL": "the data URL of {name}",
    "Cannot read the picture:": "Cannot read {name}:",
}
_DECODERS = 4
_PIXEL_BYTES = 4  # what Pillow takes for a pixel of an RGB picture


class PictureCache(LRUCache[LoadedImage]):
    """Decoded pictures of earlier requests, by API key and SHA-256 of the encoded bytes; safe from several threads.

    A picture that comes again is neither decoded nor hashed pixel by pixel again. The limits are checked before, on the
    encoded bytes, as if there were no cache.

    Args:
        max_bytes: memory of all pictures together; 0 keeps none.
        decoders: pictures that are decoded at the same time, since each may take hundreds of megabytes.
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
        picture = self.get(key)
        if picture is None:
            picture = self._decode(data, limits)
            picture = dataclasses.replace(picture, digest=pixel_digest(picture.image))
            self.put(key, picture)
        return picture

    def _decode(self, data: bytes, limits: ImageLimits) -> LoadedImage:
        with self._decoders:
            return load_image(data, limits)


@dataclass(frozen=True, slots=True)
class Converter:
    """Makes the engine's requests for one model.

    Args:
        model: whose limits and tokenizer count.
        limits: of the server.
        fetch: which hosts pictures may come from.
        on_rejected: called with a short reason for every picture that is refused.
        cache: decodes pictures and keeps them.
        strict: refuse a `max_tokens` above the limit; otherwise the answer is cut at the limit.
    """

    model: QZoom
    limits: ServerLimits
    fetch: FetchPolicy
    on_rejected: Callable[[str], None]
    cache: PictureCache
    strict: bool = False

    def request(self, body: PerceiveRequest, tenant: str = "") -> Request:
        """Read the pictures and tokenise.

        Args:
            body: what the client sent.
            tenant: decoded pictures are shared within a tenant only.

        Raises:
            QZoomError: a picture, a text or an option that cannot be used.
        """
        options, note = self._options(body)
        parts = list(image_parts(body.messages))
        try:
            pictures = self._pictures(parts, tenant)
        except (ApiError, ImageError) as error:
            self.on_rejected(from_exception(error).code)
            raise
        if note:
            pictures[0] = replace(pictures[0], notes=(*pictures[0].notes, note))
        by_part = {id(part): picture for (_, part), picture in zip(parts, pictures, strict=True)}
        return self.model.request(None, [_message(message, by_part) for message in body.messages], **options)

    def must_fetch(self, body: PerceiveRequest) -> bool:
        """Whether pictures come over the network, so that reading them may take long."""
        return any(part.image_url.url[:5].lower() != "data:" for _, part in image_parts(body.messages))

    def _pictures(self, parts: Sequence[tuple[str, ImageUrlPart]], tenant: str) -> list[LoadedImage]:
        files: list[bytes] = []
        for number, (where, part) in enumerate(parts, start=1):
            with _naming(where, number):
                files.append(self._read(part.image_url.url, self.limits.total_picture_bytes - sum(map(len, files))))
                check_pictures(files[-1:], self.limits, first=number)
        check_pictures(files, self.limits)
        pictures = []
        for number, ((where, _), data) in enumerate(zip(parts, files, strict=True), start=1):
            with _naming(where, number):
                pictures.append(self.cache.load(data, self.limits.image_limits(), tenant))
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

    def _options(self, body: PerceiveRequest) -> tuple[dict[str, Any], str]:
        """Options of the library, and a note on what was wished and cannot be."""
        controls = body.qzoom or ZoomControls()
        sampling = _sampling(body, self.limits) if isinstance(body, ChatRequest) else {"max_new_tokens": 1}
        check_tokens(body, self.limits, strict=self.strict)
        details = [part.image_url.detail for _, part in image_parts(body.messages)]
        detail = most_demanding(details)
        zoom, note = controls.zoom or _MODES[detail], ""
        if not self.model.has_region:
            self._check_heads(body)
            if zoom == "always":
                note = f'The model has no region branch and cannot zoom, so detail "{detail}" is read as "low".'
            zoom, detail = "never", "low"
        largest = detail == "original" and controls.zoom is None and controls.max_visual_tokens is None
        coarse, region = None, None
        if details:
            coarse, region = self._budgets(zoom, len(details), controls.max_visual_tokens, largest=largest)
        looking = {
            "zoom": zoom,
            "gate_threshold": controls.gate_threshold,
            "region_threshold": controls.region_threshold,
            "coarse_tokens": coarse,
            "region_tokens": region,
        }
        return sampling | looking, note

    def _check_heads(self, body: PerceiveRequest) -> None:
        """Refuse what only a model that zooms can do."""
        text = "This server's model has no region branch, so it cannot zoom; "
        if not isinstance(body, ChatRequest):
            text += "ask /v1/chat/completions instead of /v1/perceive."
            raise ApiError(400, text, param="model", code="cannot_zoom")
        if body.qzoom and body.qzoom.zoom == "always":
            raise ApiError(400, text + 'leave "zoom" out.', param="qzoom.zoom", code="cannot_zoom")

    def _budgets(
        self, zoom: ZoomMode, pictures: int, total: int | None, *, largest: bool
    ) -> tuple[TokenBudget | None, TokenBudget | None]:
        """Limits of the coarse pass over each picture and of all regions together; None keeps the checkpoint's own.

        Where even those could exceed the server's limit, that limit is shared like a total of the client's.
        """
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
        if most < 1 and total is None:
            text = f"{pictures} pictures need more visual tokens than this server allows; send fewer."
            raise ApiError(400, text, param="messages", code="too_many_tokens")
        if most < 1:
            raise BudgetError(f"max_visual_tokens is too little for {pictures} pictures; allow {2 * pictures} or more.")
        return _cut(coarse, most), second


def check_tokens(body: PerceiveRequest, limits: ServerLimits, *, strict: bool = True) -> None:
    """Refuse token budgets above the server's ceilings; `max_tokens` only where `strict`.

    Raises:
        ApiError: status 400; it names the fields that were sent.
    """
    most = dict.fromkeys(("max_tokens", "max_completion_tokens"), limits.max_new_tokens)
    sent = {name: getattr(body, name, None) for name in most}
    if sent["max_completion_tokens"] is not None:
        del sent["max_tokens"]
    sent["qzoom.max_visual_tokens"] = body.qzoom and body.qzoom.max_visual_tokens
    for name, value in sent.items():
        limit = most.get(name, limits.visual_tokens)
        if value is not None and value > limit and (strict or name not in most):
            text = f"{name} is above this server's limit of {limit}; ask for less."
            raise ApiError(400, text, param=name, code="too_many_tokens")


def check_pictures(pictures: Sequence[bytes], limits: ServerLimits, *, first: int = 1) -> None:
    """Refuse encoded pictures that together unpack to too much; only their headers are read.

    Args:
        pictures: the files' bytes, from data URLs or fetched.
        limits: the server's limits.
        first: number of the first of them, for errors.

    Raises:
        ApiError: status 413, too many bytes or pixels together.
        ImageError: one of them is not a picture or is itself outside the limits.
    """
    if sum(map(len, pictures)) > limits.total_picture_bytes:
        raise pictures_too_large(limits.total_picture_bytes)
    own = limits.image_limits()
    pixels = 0
    for number, data in enumerate(pictures, start=first):
        width, height = picture_size(data, f"picture {number}", own)
        pixels += width * height
    if pixels > limits.total_pixels:
        most = f"{limits.total_pixels / 1e6:.4g} megapixels"
        text = f"The pictures have more pixels together than the limit of {most}; shrink them or send fewer."
        raise ApiError(413, text, param="messages", code="too_many_pixels")


def image_parts(messages: Sequence[Message]) -> Iterator[tuple[str, ImageUrlPart]]:
    """The pictures of a conversation in order, each with its path in the body for error texts."""
    for i, message in enumerate(messages):
        if isinstance(message.content, list):
            for j, part in enumerate(message.content):
                if isinstance(part, ImageUrlPart):
                    yield f"messages[{i}].content[{j}].image_url", part


def most_demanding(details: Sequence[str | None]) -> str:
    """The highest of low, auto, high, original; None counts as "auto", and so does no picture at all."""
    ranks = [_DETAILS.index(detail or "auto") for detail in details]
    return _DETAILS[max(ranks)] if ranks else "auto"


def _cut(budget: TokenBudget, most: int) -> TokenBudget:
    return TokenBudget(min(budget.min_tokens, most), most)


def _message(message: Message, pictures: dict[int, LoadedImage]) -> dict[str, Any]:
    if message.content is None:
        return {"role": message.role, "content": None, "refusal": message.refusal}
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImageUrlPart):
            parts.append({"type": "image", "image": pictures[id(part)]})
        elif isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
        elif isinstance(part, RefusalPart):
            parts.append({"type": "text", "text": part.refusal})
    return {"role": message.role, "content": parts}


def _sampling(body: ChatRequest, limits: ServerLimits) -> dict[str, Any]:
    """Decoding options; those that were not given keep the library's own default."""
    tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs 'logprobs': true.", param="top_logprobs")
    options: dict[str, Any] = {
        "max_new_tokens": min(128 if tokens is None else tokens, limits.max_new_tokens),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k and max(body.top_k, 0),  # -1 is how some clients write "all"
        "stop": body.stop,
        "seed": body.seed,
        "ignore_eos": body.ignore_eos,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "json_schema": _json_schema(body, limits),
    }
    return {name: value for name, value in options.items() if value is not None}


def _json_schema(body: ChatRequest, limits: ServerLimits) -> str | None:
    if isinstance(body.response_format, ObjectFormat):
        return ANY_OBJECT
    if not isinstance(body.response_format, SchemaFormat):
        return None
    schema = json.dumps(body.response_format.json_schema.rules)
    if len(schema) > limits.text_chars:
        text = f"The JSON schema has more characters than the limit of {limits.text_chars}; send a smaller one."
        raise ApiError(400, text, param="response_format", code="text_too_long")
    return schema


def variants(request: Request, count: int) -> list[Request]:
    """One request several times; a seed goes up by one each time, so that drawn answers differ."""
    sampling = request.options.sampling
    if sampling.seed is None:
        return [request] * count
    seeds = [(sampling.seed + 2**63 + i) % 2**64 - 2**63 if i else sampling.seed for i in range(count)]
    options = [replace(request.options, sampling=replace(sampling, seed=seed)) for seed in seeds]
    return [replace(request, options=own) for own in options]


@contextmanager
def _naming(where: str, number: int) -> Iterator[None]:
    """Adds to errors about a picture which one it is."""
    try:
        yield
    except ImageError as error:
        refusal = from_exception(error, where)
        name, text = f"picture {number}", str(error)
        if name not in text.lower():
            for thing, named in _THINGS.items():
                text = text.replace(thing, named.format(name=name), 1)
            text = text if name in text else f"Picture {number}: {text}"
        raise ApiError(refusal.status, text, param=where, code=refusal.code, headers=refusal.headers) from error
