"""From a checked request body to the engine's request: pictures decoded, `detail` and `qzoom` turned into options.

All of it blocks (base64, network, decoding), so it runs in a pool of threads, never on the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qzoom.config import TokenBudget
from qzoom.engine.grammar import ANY_OBJECT
from qzoom.engine.request import Request, coarse_budgets, region_budget, share_tokens
from qzoom.errors import BudgetError, ConfigError, ImageError
from qzoom.images.fetch import FetchPolicy, fetch_image
from qzoom.images.load import LoadedImage, read_data_url
from qzoom.images.pdf import is_pdf
from qzoom.model import QZoom
from qzoom.serving.errors import ApiError, from_exception, pictures_too_large
from qzoom.serving.pictures import PictureCache, PictureTotals, ReadingTime, pixels_of
from qzoom.serving.protocol import (
    ChatRequest,
    FilePart,
    ImageUrlPart,
    Message,
    ObjectFormat,
    PagesRequest,
    PerceiveRequest,
    RefusalPart,
    SchemaFormat,
    TextPart,
    ZoomControls,
)
from qzoom.serving.settings import ServerLimits
from qzoom.types import ZoomMode

PicturePart: TypeAlias = ImageUrlPart | FilePart
_DETAILS = ("low", "auto", "high", "original")
_MODES: dict[str, ZoomMode] = {"low": "never", "auto": "auto", "high": "always", "original": "always"}
_THINGS = {
    "the picture bytes": "{name}",
    "the data URL": "the data URL of {name}",
    "Cannot read the picture:": "Cannot read {name}:",
}


@dataclass(frozen=True, slots=True)
class PreparedBody:
    """A checked body whose data URLs are decoded; pictures at web addresses are not fetched yet."""

    parts: list[tuple[str, PicturePart]]  # pictures and files, each with its path in the body
    files: list[bytes | None]  # the encoded bytes of each; None at a web address
    options: dict[str, Any]  # of the library
    note: str  # on what was wished and cannot be

    @property
    def slow(self) -> bool:
        """Whether pictures come over the network or are pages of PDFs, so that reading them may take long."""
        return any(data is None or is_pdf(data) for data in self.files)


@dataclass(frozen=True, slots=True)
class Converter:
    """Makes the engine's requests for one model."""

    model: QZoom  # whose limits and tokenizer count
    limits: ServerLimits  # of the server
    fetch: FetchPolicy  # which hosts pictures may come from
    on_rejected: Callable[[str], None]  # called with a short reason for every picture that is refused
    cache: PictureCache  # decodes pictures and keeps them
    strict: bool = False  # refuse a `max_tokens` above the limit; otherwise the answer is cut at the limit

    def prepare(self, body: PerceiveRequest | PagesRequest, reading: ReadingTime) -> PreparedBody:
        """Check the options and decode data URLs (QZoomError: an option or a data URL that cannot be used, or the time
        is over)."""
        parts: list[tuple[str, PicturePart]]
        if isinstance(body, PagesRequest):
            options, note = dict[str, Any](), ""
            parts = [("file", FilePart(type="file", file=body.file))]
        else:
            options, note = self._options(body)
            parts = list(image_parts(body.messages))
        files: list[bytes | None] = []
        with self._counting():
            for number, (where, part) in enumerate(parts, start=1):
                url = _address(part)
                with _naming(where, number, reading):
                    reading.left_s()
                    is_data = url[:5].lower() == "data:"
                    files.append(read_data_url(url, self.limits.image_limits()) if is_data else None)
        return PreparedBody(parts, files, options, note)

    def request(self, body: PerceiveRequest, prepared: PreparedBody, tenant: str, reading: ReadingTime) -> Request:
        """Read the pictures and tokenise.

        Args:
            prepared: what `prepare` made of the body.
            reading: until when.

        Raises:
            QZoomError: a picture or a text that cannot be used, or the time is over.
        """
        groups = self._pictures(prepared, tenant, (body.qzoom and body.qzoom.pages) or "", reading)
        self._check_pages(body, [picture for group in groups for picture in group], prepared.options)
        if prepared.note:
            first, *rest = groups[0]
            groups[0] = (replace(first, notes=(*first.notes, prepared.note)), *rest)
        by_part = {id(part): group for (_, part), group in zip(prepared.parts, groups, strict=True)}
        messages = [_message(message, by_part) for message in body.messages]
        return self.model.request(None, messages, **prepared.options)

    def pages(
        self, body: PagesRequest, prepared: PreparedBody, tenant: str, reading: ReadingTime
    ) -> tuple[LoadedImage, ...]:
        """Draw the pages of a PDF; arguments and errors as in `request`."""
        return self._pictures(prepared, tenant, (body.qzoom and body.qzoom.pages) or "", reading)[0]

    def _pictures(
        self, prepared: PreparedBody, tenant: str, pages: str, reading: ReadingTime
    ) -> list[tuple[LoadedImage, ...]]:
        """The pictures of every part. PDFs are drawn within the pixels that the pictures leave."""
        with self._counting():
            files, left = self._files(prepared, reading)
            if pages and not any(map(is_pdf, files)):
                text = "qzoom.pages chooses pages of a PDF, but the messages have none; leave it out."
                raise ApiError(400, text, param="qzoom.pages", code="invalid_pages")
            pictures = []
            for number, ((where, _), data) in enumerate(zip(prepared.parts, files, strict=True), start=1):
                own, chosen = self.limits.image_limits(), ""
                if is_pdf(data):
                    own, chosen = replace(own, max_pixels=max(1, min(own.max_pixels, left))), pages
                with _naming(where, number, reading):
                    pictures.append(self.cache.load(data, own, tenant, chosen, reading=reading))
                left -= pixels_of(pictures[-1]) if is_pdf(data) else 0
            return pictures

    def _files(self, prepared: PreparedBody, reading: ReadingTime) -> tuple[list[bytes], int]:
        """The encoded bytes of every part, and the pixels that PDFs may have together; each header is read as soon as
        its picture is there, so that the rest is not read in vain."""
        files: list[bytes] = []
        totals = PictureTotals(self.limits)
        left_bytes = self.limits.total_picture_bytes - sum(len(data) for data in prepared.files if data)
        if left_bytes < 0:
            raise pictures_too_large(self.limits.total_picture_bytes)
        for number, ((where, part), data) in enumerate(zip(prepared.parts, prepared.files, strict=True), start=1):
            with _naming(where, number, reading):
                if data is None:
                    data = self._fetch(_address(part), left_bytes, reading)
                    left_bytes -= len(data)
                totals.add(data, number)
            files.append(data)
        return files, self.limits.total_pixels - totals.pixels

    def _fetch(self, url: str, left_bytes: int, reading: ReadingTime) -> bytes:
        if not url[:8].lower().startswith(("http:", "https:")):
            raise ImageError(
                "Cannot read the picture: it is neither a data URL nor http(s); write data:image/png;base64,<data>."
            )
        most = max(1, min(self.fetch.max_bytes, self.limits.picture_bytes, left_bytes))
        seconds = reading.at_most(self.fetch.timeout_s)
        return fetch_image(url, replace(self.fetch, max_bytes=most, timeout_s=seconds))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts pictures that are refused."""
        try:
            yield
        except (ApiError, ImageError) as error:
            self.on_rejected(from_exception(error).code)
            raise

    def _check_pages(self, body: PerceiveRequest, pictures: Sequence[LoadedImage], options: dict[str, Any]) -> None:
        """Refuse pages whose least tokens together are above the server's limit or the client's total (BudgetError:
        above the client's `max_visual_tokens`; ApiError: above the server's limit)."""
        engine, pages = self.model.engine, sum(picture.page is not None for picture in pictures)
        if pages < 2:
            return
        looking = self.model.make_options(**{name: options[name] for name in ("coarse_tokens", "region_tokens")})
        needed = sum(budget.max_tokens for budget in coarse_budgets(engine, looking, pictures))
        needed += region_budget(engine, looking).max_tokens if options["zoom"] != "never" else 0
        total = body.qzoom and body.qzoom.max_visual_tokens
        if total and needed > total:
            raise BudgetError(f"max_visual_tokens is too little for {pages} pages; allow {needed}, or choose fewer.")
        if needed > self.limits.visual_tokens:
            text = f"{pages} pages need more visual tokens than this server allows; choose fewer with qzoom.pages."
            raise ApiError(400, text, param="messages", code="too_many_tokens")

    def _options(self, body: PerceiveRequest) -> tuple[dict[str, Any], str]:
        """Options of the library, and a note on what was wished and cannot be."""
        controls = body.qzoom or ZoomControls()
        sampling = _sampling(body, self.limits) if isinstance(body, ChatRequest) else {"max_new_tokens": 1}
        check_tokens(body, self.limits, strict=self.strict)
        details = [
            part.image_url.detail if isinstance(part, ImageUrlPart) else None for _, part in image_parts(body.messages)
        ]
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


def _address(part: PicturePart) -> str:
    url = part.image_url.url if isinstance(part, ImageUrlPart) else part.file.file_data
    return url.strip()


def image_parts(messages: Sequence[Message]) -> Iterator[tuple[str, PicturePart]]:
    """The pictures and files of a conversation in order, each with its path in the body for error texts."""
    for i, message in enumerate(messages):
        if isinstance(message.content, list):
            for j, part in enumerate(message.content):
                if isinstance(part, ImageUrlPart | FilePart):
                    yield f"messages[{i}].content[{j}].{part.type}", part


def most_demanding(details: Sequence[str | None]) -> str:
    """The highest of low, auto, high, original; None counts as "auto", and so does no picture at all."""
    ranks = [_DETAILS.index(detail or "auto") for detail in details]
    return _DETAILS[max(ranks)] if ranks else "auto"


def _cut(budget: TokenBudget, most: int) -> TokenBudget:
    return TokenBudget(min(budget.min_tokens, most), most)


def _message(message: Message, pictures: dict[int, tuple[LoadedImage, ...]]) -> dict[str, Any]:
    if message.content is None:
        return {"role": message.role, "content": None, "refusal": message.refusal}
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImageUrlPart | FilePart):
            parts += [{"type": "image", "image": picture} for picture in pictures[id(part)]]
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
def _naming(where: str, number: int, reading: ReadingTime) -> Iterator[None]:
    """Adds to errors about a picture which one it is; one that ran out of the request's time is a DeadlineError."""
    try:
        yield
    except ConfigError as error:
        raise ApiError(400, f"Picture {number}: {error}", param="qzoom.pages", code="invalid_pages") from error
    except ImageError as error:
        reading.left_s()
        refusal = from_exception(error, where)
        name, text = f"picture {number}", str(error)
        if name not in text.lower():
            for thing, named in _THINGS.items():
                text = text.replace(thing, named.format(name=name), 1)
            text = text if name in text else f"Picture {number}: {text}"
        raise ApiError(refusal.status, text, param=where, code=refusal.code, headers=refusal.headers) from error
