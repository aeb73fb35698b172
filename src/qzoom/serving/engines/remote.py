"""One or several `vllm serve` with qzoom's plug-in, each an address of its own.

Prompts go out as token ids with the resized pictures, so chat template and pictures are the same as everywhere. Clients
never reach these addresses: what they send in `kv_transfer_params` is not passed on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import httpx

from qzoom.errors import CheckpointError, ConfigError, EngineDownError, InternalError, QueueFullError
from qzoom.images.load import png_data_url
from qzoom.integrations.vllm.heads import LookMode
from qzoom.model import QZoom
from qzoom.serving.engines.zooming import (
    Piece,
    View,
    ZoomingEngine,
    cache_salt,
    checked_reply,
    lower_max_positions,
    retry_after,
)
from qzoom.serving.routing import choose, picture_key, rank
from qzoom.serving.settings import SchedulerLimits

_GENERATE = "/inference/v1/generate"
_CONNECT_S = 5.0
_HELLO_S = 60.0
_START = "start it with: vllm serve $(qzoom vllm-args {model})"
_log = logging.getLogger("qzoom.serving")


class RemoteEngine(ZoomingEngine):
    """Looks and answers by vLLM servers.

    Args:
        model: tokenizer, arithmetic and limits of the same checkpoint.
        identity: of the checkpoint, see `checkpoint_identity`; empty values are not compared.
        key: API key of the servers; empty for none.

    Raises:
        ConfigError: one of them does not answer, or runs without the plug-in.
        CheckpointError: one of them has other weights.
    """

    def __init__(
        self, model: QZoom, limits: SchedulerLimits, urls: Sequence[str], *, identity: Mapping[str, str], key: str = ""
    ) -> None:
        super().__init__(model, limits)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._identity = dict(identity)
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._names = dict[str, str]()
        self._loads = dict.fromkeys(self.urls, 0)
        with httpx.Client(timeout=_HELLO_S, headers=self._headers, trust_env=False) as client:
            for url in self.urls:
                self._greet(client, url)
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        limit = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limit, headers=self._headers, trust_env=False)

    def _greet(self, client: httpx.Client, url: str) -> None:
        """Ask a server for its name, its limit and its weights."""
        start = _START.format(model=self.model.name)
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not an address; write http://HOST:PORT.")
        try:
            listed = client.get(f"{url}/v1/models")
            if listed.status_code == 401:
                raise ConfigError(f"The engine at {url} refuses the key; put its key into QZOOM_ENGINE_KEY.")
            card = listed.raise_for_status().json()["data"][0]
            self._names[url] = str(card["id"])
            lower_max_positions(self.model, int(card.get("max_model_len") or 10**9))
            hello = {
                "model": self._names[url],
                "token_ids": [self.model.engine.backbone.eos_ids[0]],
                "sampling_params": {"max_tokens": 1, "detokenize": False},
                "kv_transfer_params": {"qzoom": {}},
            }
            said = client.post(url + _GENERATE, json=hello)
            if said.status_code in (404, 405):
                raise ConfigError(f"The engine at {url} has no route {_GENERATE}; {start}.")
            reply = (said.raise_for_status().json().get("kv_transfer_params") or {}).get("qzoom")
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise ConfigError(f"The engine at {url} answers with status {status}; its log says why.") from error
        except httpx.HTTPError as error:
            raise ConfigError(f"The engine at {url} does not answer ({_reason(error)}); {start}.") from error
        except (httpx.InvalidURL, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"What answers at {url} is no vLLM server; {start}.") from error
        if not isinstance(reply, dict) or "engine" not in reply:
            text = f"The engine at {url} runs without qzoom's plug-in; install qzoom there too, and {start}."
            raise ConfigError(text)
        if difference := self._difference(reply):
            raise CheckpointError(f"The engine at {url} has {difference} than {self.model.name}; {start}.")

    def _difference(self, reply: Mapping[str, Any]) -> str:
        """What of an engine's weights is not what it should be; empty when all is."""
        own = reply.get("engine") or {}
        for part, words in (("base", "another base model"), ("heads", "another gate and region branch")):
            if self._identity.get(part) and own.get(part) != self._identity[part]:
                return words
        return ""

    async def close(self) -> None:
        """Close all connections."""
        await super().close()
        await self._client.aclose()

    async def health(self) -> str:
        """See `ServingEngine.health`; one server that answers is enough."""

        async def ask(url: str) -> bool:
            try:
                return (await self._client.get(f"{url}/health", timeout=_CONNECT_S)).status_code == 200
            except httpx.HTTPError:
                return False

        return "" if any(await asyncio.gather(*map(ask, self.urls))) else "no engine answers"

    async def send_look(self, view: View, mode: LookMode) -> tuple[dict[str, Any], Piece | None]:
        """See `ZoomingEngine.send_look`."""
        more = {"kv_transfer_params": {"qzoom": self.look_params(view, mode)}}
        body = await self._thread(partial(self._body, view, self.sampling(view, 1), more))
        async with self._post(view, body) as (url, response):
            try:
                said = json.loads(await response.aread())
                reply, first = (said.get("kv_transfer_params") or {}).get("qzoom"), _piece(said)
            except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise _ended(url) from error
        if isinstance(reply, dict) and (difference := self._difference(reply)):
            raise EngineDownError(f"The engine at {url} was started again with {difference}; restart it with the old.")
        return checked_reply(reply), first and dataclasses.replace(first, finish="")

    async def send_answer(self, view: View) -> AsyncGenerator[Piece, None]:
        """See `ZoomingEngine.send_answer`."""
        more = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        body = await self._thread(partial(self._body, view, self.sampling(view), more))
        async with self._post(view, body) as (url, response):
            finished = False
            try:
                async for line in response.aiter_lines():
                    if line.startswith("data: {") and (piece := _piece(json.loads(line[6:]))):
                        finished = finished or bool(piece.finish)
                        yield piece
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                raise _ended(url) from error
            if not finished:
                raise _ended(url)

    @asynccontextmanager
    async def _post(self, view: View, body: dict[str, Any]) -> AsyncIterator[tuple[str, httpx.Response]]:
        """A response that has begun, of the first server that takes the request."""
        failures, full = [], list[float]()
        for url in self._order(view):
            self._loads[url] += 1
            try:
                request = self._client.build_request("POST", url + _GENERATE, json=body | {"model": self._names[url]})
                try:
                    response = await self._client.send(request, stream=True)
                except httpx.HTTPError as error:  # nothing was answered yet, so another one may be asked
                    failures.append(f"{url}: {_reason(error)}")
                    continue
                async with aclosing(response):
                    if response.status_code == 429:
                        full.append(retry_after(response.headers))
                    if response.status_code >= 500 or response.status_code == 429:
                        failures.append(f"{url}: status {response.status_code}")
                        continue
                    if response.status_code != 200:
                        said = (await response.aread())[:500].decode(errors="replace")
                        _log.error("the engine at %s refused a request: %s %s", url, response.status_code, said)
                        raise InternalError(f"The engine refused the request with status {response.status_code}.")
                    yield url, response
                    return
            finally:
                self._loads[url] -= 1
        if full:  # those that answer will take requests again
            raise QueueFullError("The engines behind this server are full; try again in a moment.", min(full))
        _log.error("no engine answers: %s", "; ".join(failures))
        raise EngineDownError("No engine behind this server answers now; try again in a moment.")

    def _order(self, view: View) -> list[str]:
        """The servers, the one first that has a conversation's pictures and is not overloaded."""
        if len(self.urls) == 1:
            return list(self.urls)
        key = picture_key(view.request, view.tenant)
        first = choose(key, self._loads)
        return [first, *(url for url in rank(key, self.urls) if url != first)]

    def _body(self, view: View, sampling: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        body = {"token_ids": [*view.ids, *view.begun], "sampling_params": {"detokenize": False} | sampling} | more
        if view.images:
            body["content_parts"] = [{"type": "image_url", "url": png_data_url(image)} for image in view.images]
        if view.tenant:
            body["cache_salt"] = cache_salt(view.tenant)
        return body


def _piece(record: dict[str, Any]) -> Piece | None:
    """Tokens of a chunk; None for chunks without any."""
    if "error" in record:
        raise ValueError("the engine sent an error")
    details = (record.get("usage") or {}).get("prompt_tokens_details") or {}
    cached = int(details.get("cached_tokens") or 0)
    if not record.get("choices"):
        return Piece(cached_tokens=cached) if cached else None
    choice = record["choices"][0]
    return Piece(tuple(choice.get("token_ids") or ()), finish=choice.get("finish_reason") or "", cached_tokens=cached)


def _ended(url: str) -> EngineDownError:
    _log.error("the engine at %s ended a response early", url)
    return EngineDownError("The engine behind this server ended in the middle of the answer; ask again.")


def _reason(error: httpx.HTTPError) -> str:
    text = re.sub(r"\[Errno -?\d+\] ", "", " ".join(str(error).split()))[:100].rstrip(". ")
    return text.lower() or type(error).__name__
