"""Perception here, the answer from any OpenAI-compatible vision model: plain vLLM, SGLang, a hosted service.

The native engine looks: gate and regions are qzoom's own. The other model gets coarse view and crop as two pictures,
one after the other, and needs no plug-in. Its key is read from QZOOM_ANSWER_KEY.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import Any

import openai
import torch

from qzoom.engine.perceive import CoarseResult, Stopwatch, decide, with_maps
from qzoom.errors import ConfigError, DeadlineError, EngineDownError, EngineRefusedError, QueueFullError, QZoomError
from qzoom.heads.region_map import RegionMap
from qzoom.images.load import png_data_url
from qzoom.integrations.vllm.heads import LookMode
from qzoom.model import QZoom
from qzoom.serving.engines.base import Job
from qzoom.serving.engines.native import NativeEngine
from qzoom.serving.engines.zooming import Piece, View, ZoomingEngine, retry_after
from qzoom.serving.settings import ServerSettings

KEY = "QZOOM_ANSWER_KEY"
_GREET_S = 10.0
_PENALTIES = ("presence_penalty", "frequency_penalty")
_log = logging.getLogger("qzoom.serving")


class AnswerEngine(ZoomingEngine):
    """Looks with the model in this process and lets another one answer.

    Args:
        model: loaded with its weights; it looks.
        url: the other model's endpoint, as http://HOST:PORT/v1.
        name: what it is called there.

    Raises:
        ConfigError: nobody answers at the address, the key is refused, or the model's family cannot look alone.
    """

    decides = (*ZoomingEngine.decides, "answer")
    refused: tuple[str, ...] = (*ZoomingEngine.refused, "top_k", "ignore_eos")  # not in OpenAI's interface

    def __init__(self, model: QZoom, settings: ServerSettings, url: str, name: str, *, key: str = "") -> None:
        if model.engine.backbone.square_padding is not None:
            raise ConfigError(
                f"{model.name} pads pictures to a square; --engine answer takes models whose view of a picture is bare."
            )
        super().__init__(model, settings.scheduler)
        self.url, self.name = url, name
        self._native = NativeEngine(model, settings)
        _greet(url, key)
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", timeout=settings.deadline_s)

    def start(self) -> None:
        """Start the native engine."""
        self._native.start()

    async def close(self) -> None:
        """Close all connections and the native engine."""
        await super().close()
        await self._client.close()
        await self._native.close()

    async def health(self) -> str:
        """See `ServingEngine.health`; of the part in this process."""
        return await self._native.health()

    async def send_look(self, view: View, mode: LookMode) -> tuple[dict[str, Any], Piece | None]:
        """Not needed: `_coarse` looks in this process."""
        raise NotImplementedError

    async def _coarse(self, job: Job, clock: Stopwatch, *, everyone: bool) -> tuple[CoarseResult, View, Piece | None]:
        """The coarse view, and what the native engine sees in it."""
        request, engine = job.request, self.model.engine
        with clock.step("resize"):
            state, view = await self._thread(partial(self._view, job))
        if not everyone and (request.options.zoom == "never" or not request.pictures):
            return CoarseResult(request, state, decide(engine, request, None)), view, None
        with clock.step("look"):
            perception = await self._native.look(job)
        item = CoarseResult(request, state, perception.gate)
        if everyone or item.gate.zoomed:
            blurred = [torch.from_numpy(heat_map.values) for heat_map in perception.heat_maps]
            maps = tuple(RegionMap(values, None, torch.ones_like(values), values, values) for values in blurred)
            item = with_maps(engine, item, maps)
        return item, view, None

    async def send_answer(self, view: View) -> AsyncGenerator[Piece, None]:
        """See `ZoomingEngine.send_answer`."""
        finish = ""
        try:
            messages = await self._thread(partial(_messages, view))
            create: Any = self._client.chat.completions.create
            stream = await create(
                model=self.name,
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                **_sampling(view),
            )
            async for chunk in stream:
                if piece := _piece(chunk):
                    finish = piece.finish or finish
                    yield piece
        except openai.OpenAIError as error:
            raise _translated(error, self.url) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            _log.exception("the endpoint at %s sent what is no stream of completions", self.url)
            raise EngineRefusedError("The answering model sent something that is no answer; ask again.") from error
        if not finish:
            raise EngineDownError("The answering model ended in the middle of the answer; ask again.")


def _greet(url: str, key: str) -> None:
    """One call that costs nothing, so that a wrong address or key is found at start (ConfigError: nobody answers there,
    or the key is refused)."""
    try:
        with openai.OpenAI(base_url=url, api_key=key or "none", timeout=_GREET_S, max_retries=0) as client:
            client.models.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise ConfigError(f"The endpoint at {url} refuses the key (status {error.status_code}); set {KEY}.") from error
    except openai.APIStatusError:
        return  # somebody answers; not every service lists its models
    except (openai.APIConnectionError, openai.OpenAIError, ValueError, TypeError) as error:
        raise ConfigError(
            f"Nobody answers at {url}; name an OpenAI-compatible endpoint as http://HOST:PORT/v1."
        ) from error


def _messages(view: View) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form; a picture is its coarse view and the crops that follow it."""
    pictures = iter(view.pictures)

    def parts(content: Any) -> Iterator[dict[str, Any]]:
        for part in content:
            if part["type"] == "text":
                yield part
            else:
                yield from (
                    {"type": "image_url", "image_url": {"url": png_data_url(image)}} for image in next(pictures)
                )

    messages = []
    for message in view.request.conversation.messages:
        content = message["content"]
        plain = isinstance(content, str) or content is None or message["role"] != "user"
        if plain and not isinstance(content, str | None):
            content = "".join(part["text"] for part in content)
        messages.append({"role": message["role"], "content": content if plain else list(parts(content))})
    return messages


def _sampling(view: View) -> dict[str, Any]:
    """What the endpoint is asked."""
    params = view.request.options.sampling
    out: dict[str, Any] = {"max_tokens": params.max_new_tokens, "temperature": params.temperature}
    if params.temperature:
        out["top_p"] = params.top_p
    out |= {name: getattr(params, name) for name in _PENALTIES if getattr(params, name)}
    if params.stop:
        out["stop"] = list(params.stop)
    if params.seed is not None:
        out["seed"] = params.seed
    return out


def _piece(chunk: Any) -> Piece | None:
    """Text, end and token counts of a chunk; None for one with nothing."""
    usage = chunk.usage
    details = usage.prompt_tokens_details if usage else None
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens} if usage else {}
    cached = (details.cached_tokens or 0) if details else 0
    if not chunk.choices:
        return Piece(cached_tokens=cached, **counts) if usage else None
    choice = chunk.choices[0]
    finish = "length" if choice.finish_reason == "length" else "stop" if choice.finish_reason else ""
    return Piece(text=choice.delta.content or "", finish=finish, cached_tokens=cached, **counts)


def _translated(error: openai.OpenAIError, url: str) -> QZoomError:
    """The error for our client; what the endpoint said goes to the log."""
    _log.error("the endpoint at %s: %s", url, str(error)[:500])
    if isinstance(error, openai.RateLimitError):
        wait_s = retry_after(error.response.headers)
        return QueueFullError("The answering model has too many requests; try again later.", wait_s)
    if isinstance(error, openai.APITimeoutError):
        return DeadlineError("The answering model did not answer in the time that a request has.")
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return EngineRefusedError(f"The answering model refuses the server's key; its owner must set {KEY}.")
    if isinstance(error, openai.APIStatusError) and error.status_code < 500:
        return EngineRefusedError(
            f"The answering model refuses the request (status {error.status_code}); it must take several pictures and "
            "as many tokens as the coarse view and the region need."
        )
    if isinstance(error, openai.APIConnectionError | openai.APIStatusError):
        return EngineDownError("The answering model cannot be reached now; try again in a moment.")
    return EngineRefusedError("The answering model sent something that is no answer; ask again.")
