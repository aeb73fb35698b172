"""What is sent: texts and pictures, their form on the wire, and the digest that a kept call is found by.

A picture counts by its pixels, so that the same crop is the same call whatever file it came from and whatever version
of a library encodes it. It is encoded only when a call is really made.

One HTTP request with a time limit that holds for all of it.

A library's timeouts start anew with every byte that arrives, so that a server which drips holds a thread for ever.
Requests run on an event loop of their own, where the whole of each can be cancelled.

Calls of one role's member: kept replies first, then its endpoints in turn, with pauses, until one answers.

What does not pass ends the run at once and says role, address and reason: a refused key, an unknown model, endpoints
that were down from the start or stay down. What may pass is tried again, at the next endpoint first.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import hashlib
import io
import itertools
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qzoom.errors import CallRefusedError, LaterError, StopRunError
from qzoom.llm.cache import CallCache, Cost, Fatal, Limits, Outcome, Passing, Refused, Reply, read_reply
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Client", "EndpointError", "Exchange", "Message", "Shown", "Transport", "call_key", "wire"]


KEY_SCHEMA = 1


class Shown:
    """A picture to be sent, as PNG.

    Args:
        image: RGB; left as it is.
        max_pixels: scaled down to it when larger.
    """

    def __init__(self, image: Image, max_pixels: int) -> None:
        self._image = image
        self._max_pixels = max_pixels
        self._url = ""
        self._lock = threading.Lock()
        width, height = image.size
        content = f"{width}x{height}/{min(max_pixels, width * height)}/".encode() + image.convert("RGB").tobytes()
        self.digest = hashlib.sha256(content).hexdigest()

    def url(self) -> str:
        """The picture as a data URL."""
        with self._lock:
            if not self._url:
                file = io.BytesIO()
                self._scaled().save(file, "PNG", compress_level=1)
                self._url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            return self._url

    def _scaled(self) -> Image:
        from PIL import Image

        width, height = self._image.size
        image = self._image.convert("RGB")
        if width * height <= self._max_pixels:
            return image
        share = math.sqrt(self._max_pixels / (width * height))
        size = (max(1, math.floor(width * share)), max(1, math.floor(height * share)))
        return image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message of a chat.

    Args:
        role: "system" or "user".
        parts: texts and pictures in order.
    """

    role: str
    parts: tuple[str | Shown, ...]


def wire(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as an endpoint takes them."""
    return [{"role": message.role, "content": _content(message.parts)} for message in messages]


def call_key(
    name: str, model: str, messages: Sequence[Message], sampling: Sampling, extra: Mapping[str, Any], sample: int
) -> str:
    """Hex digest of all that decides a reply.

    Args:
        name: of the role's member, since two members may serve different weights under one model name.
        model: name at the endpoint.
        messages: the chat.
        sampling: how replies are drawn.
        extra: further fields of the request.
        sample: number of the sample.
    """
    parts = [
        [message.role, [part if isinstance(part, str) else {"picture": part.digest} for part in message.parts]]
        for message in messages
    ]
    drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.send_seed]
    content = [KEY_SCHEMA, name, model, parts, drawn, dict(extra), sample]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _content(parts: Sequence[str | Shown]) -> Any:
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.url()}}
        for part in parts
    ]


_MOST_BYTES = 32 * 2**20


class Transport:
    """Sends requests; threads may share it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._lock = threading.Lock()

    def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Outcome:
        """Send a chat completion request.

        Args:
            url: of the completions.
            body: JSON.
            headers: beside those of JSON.
            timeout_s: for all of it.

        Raises:
            StopRunError: `close` was called meanwhile.
        """
        sent = {"content-type": "application/json", **headers}
        status, retry_after, data = self._run("POST", url, body, sent, timeout_s)
        return Passing(data.decode()) if status == 0 else read_reply(status, retry_after, data)

    def reach(self, url: str, headers: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
        """Whether anybody is there.

        Args:
            url: to get.
            headers: likewise.
            timeout_s: for all of it.

        Returns:
            The HTTP status and "", or 0 and why there is none.
        """
        status, _, data = self._run("GET", url, None, headers, timeout_s)
        return status, data.decode() if status == 0 else ""

    def close(self) -> None:
        """Let go of connections and thread, and break off what is under way; a later request starts anew."""
        with self._lock:
            loop, thread, client = self._loop, self._thread, self._client
            self._loop = self._thread = self._client = None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_finish(client), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    def _run(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body; status 0 with the reason as the body when there is no response."""
        import httpx

        loop, client = self._started()

        async def send() -> tuple[int, str | None, bytes]:
            async with client.stream(method, url, content=body, headers=dict(headers)) as response:
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > _MOST_BYTES:
                        return 0, None, b"a reply of more than 32 MiB"
                return response.status_code, response.headers.get("retry-after"), bytes(data)

        async def limited() -> tuple[int, str | None, bytes]:
            return await asyncio.wait_for(send(), timeout_s)

        future: concurrent.futures.Future[tuple[int, str | None, bytes]]
        future = asyncio.run_coroutine_threadsafe(limited(), loop)
        try:
            return future.result()
        except TimeoutError:
            return 0, None, f"no full reply within {timeout_s:g} s".encode()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return 0, None, f"no connection ({_why(error)})".encode()
        except concurrent.futures.CancelledError as error:
            raise StopRunError("The run was ended while calls were under way; run it again to go on.") from error
        except BaseException:
            future.cancel()
            raise

    def _started(self) -> tuple[asyncio.AbstractEventLoop, Any]:
        import httpx

        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
                self._client = httpx.AsyncClient(timeout=None, limits=limits)
                self._thread = threading.Thread(target=self._loop.run_forever, name="qzoom-endpoints", daemon=True)
                self._thread.start()
            return self._loop, self._client


async def _finish(client: Any) -> None:
    """Cancel all requests, so that nobody waits for them, and close the connections."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


def _why(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:160]}" if said else type(error).__name__


_GIVE_UP = 3
"""Calls in a row that fail to the end, or are all refused, before the run stops."""


class EndpointError(StopRunError):
    """An endpoint that cannot be used: down, a refused key, an unknown model."""


class Exchange:
    """What all clients of a run share: the cache, the connections, the limits.

    Args:
        cache: of calls.
        calls: retries and budgets.
    """

    def __init__(self, cache: CallCache, calls: CallSettings) -> None:
        self.cache = cache
        self.calls = calls
        self.transport = Transport()
        self.limits = Limits(cache)

    def close(self) -> None:
        """Let go of connections and file."""
        self.transport.close()
        self.cache.close()


class Client:
    """One member of a role; threads may share it.

    Args:
        role: "teacher" and so on.
        name: of the member.
        endpoints: that serve one model.
        sampling: how replies are drawn.
        exchange: what the run's clients share.
    """

    def __init__(
        self,
        role: str,
        name: str,
        endpoints: Sequence[EndpointSettings],
        sampling: Sampling,
        exchange: Exchange,
    ) -> None:
        self.role = role
        self.name = name
        self.endpoints = tuple(endpoints)
        self.sampling = sampling
        self.exchange = exchange
        self._turns = itertools.count()
        self._rests = [0.0 for _ in self.endpoints]
        self._lock = threading.Lock()
        self._lost = self._refused = 0
        self._answered = False

    @property
    def model(self) -> str:
        """Name of the member and of its model, for records."""
        model = self.endpoints[0].model
        return model if model == self.name else f"{self.name}: {model}"

    def check(self) -> None:
        """Make sure that every endpoint is there.

        Raises:
            EndpointError: one is down or refuses the key, or there is no key.
        """
        for endpoint in self.endpoints:
            if endpoint.key_env and not os.environ.get(endpoint.key_env):
                raise self._stop(endpoint, f"the environment variable {endpoint.key_env} holds no key")
            url = f"{endpoint.url.rstrip('/')}/models"
            status, reason = 0, ""
            for _ in range(2):
                status, reason = self.exchange.transport.reach(
                    url, self._headers(endpoint), self.exchange.calls.connect_s
                )
                if status:
                    break
            if status == 0:
                raise EndpointError(
                    f"The {self.role} {self.name!r} at {endpoint.url} is down: {reason}; start it or correct its url."
                )
            if status in (401, 403):
                raise self._stop(endpoint, f"it refuses the key (HTTP {status})")

    def call(self, messages: Sequence[Message], sample: int = 0) -> Reply:
        """The reply to a chat, kept or new.

        Args:
            messages: the chat.
            sample: its number; other numbers are other calls.

        Raises:
            CallRefusedError: the endpoint refuses this chat for good.
            LaterError: no endpoint answered for too long.
            EndpointError: no call can succeed.
            BudgetSpentError: nothing more may be spent.
        """
        first = self.endpoints[0]
        key = call_key(self.name, first.model, messages, self.sampling, first.extra_body, sample)
        cache = self.exchange.cache
        found = cache.find(key)
        if found is None:
            with cache.claim(key):
                found = cache.find(key)
                if found is None:
                    return self._opened(self._paid(key, messages, sample))
        cache.count(Cost(self.role, self.name, "", kept=1))
        return self._opened(found)

    def _opened(self, outcome: Reply | Refused) -> Reply:
        if isinstance(outcome, Refused):
            raise CallRefusedError(f"The {self.role} {self.name!r} refuses the request: {outcome.reason}")
        return outcome

    def _paid(self, key: str, messages: Sequence[Message], sample: int) -> Reply | Refused:
        """Ask until there is a reply or a refusal, and store it."""
        turn = next(self._turns)
        tries = [0 for _ in self.endpoints]
        free_at = [0.0 for _ in self.endpoints]
        reason = "it asks for a longer pause than longest_s"
        for _ in range(self.exchange.calls.retries + 1):
            number = self._choose(turn, free_at, tries)
            if number is None:
                break
            endpoint = self.endpoints[number]
            outcome = self._asked(endpoint, messages, sample)
            cost = Cost(self.role, self.name, endpoint.url)
            if isinstance(outcome, Passing):
                self.exchange.cache.count(replace(cost, failures=1))
                free_at[number] = self._pause(number, tries[number], outcome)
                tries[number] += 1
                reason = f"tries: {sum(tries)}, last at {endpoint.url}: {outcome.reason}"
                continue
            if isinstance(outcome, Fatal):
                self.exchange.cache.count(replace(cost, failures=1))
                raise self._stop(endpoint, outcome.reason)
            self.exchange.cache.store(key, outcome, _price(cost, endpoint, outcome))
            self._note(endpoint, outcome)
            return outcome
        raise self._lost_call(reason)

    def _asked(self, endpoint: EndpointSettings, messages: Sequence[Message], sample: int) -> Outcome:
        body = {
            "model": endpoint.model,
            "messages": wire(messages),
            **self.sampling.fields(sample),
            **endpoint.extra_body,
        }
        content = json.dumps(body, ensure_ascii=True).encode()
        calls = self.exchange.calls
        with self.exchange.limits.place(endpoint):
            cost = Cost(self.role, self.name, endpoint.url, requests=1)
            self.exchange.cache.reserve(cost, calls.budget_requests, calls.budget_money)
            return self.exchange.transport.post(endpoint.address, content, self._headers(endpoint), endpoint.timeout_s)

    def _choose(self, turn: int, free_at: Sequence[float], tries: Sequence[int]) -> int | None:
        """The next endpoint, after a pause if all need one; None when the pause would be too long."""
        order = [(turn + i) % len(self.endpoints) for i in range(len(self.endpoints))]
        with self._lock:
            ready = {i: max(free_at[i], self._rests[i]) for i in order}
        number = min(order, key=lambda i: (max(0.0, ready[i] - time.monotonic()), tries[i]))
        wait = ready[number] - time.monotonic()
        if wait > self.exchange.calls.longest_s:
            return None
        if wait > 0:
            time.sleep(wait)
        return number

    def _pause(self, number: int, tried: int, failure: Passing) -> float:
        """When this call may come back to an endpoint. What the endpoint itself asks for holds for all calls."""
        calls = self.exchange.calls
        now = time.monotonic()
        pause = random.uniform(0, min(calls.longest_s, calls.backoff_s * 2 ** min(tried, 60)))
        if failure.wait_s is None:
            return now + pause
        with self._lock:
            self._rests[number] = max(self._rests[number], now + failure.wait_s)
        return now + max(failure.wait_s, pause)

    def _note(self, endpoint: EndpointSettings, outcome: Reply | Refused) -> None:
        """Remember how it went; an endpoint that only ever refuses is no use."""
        with self._lock:
            self._lost = 0
            if isinstance(outcome, Reply):
                self._answered = True
                return
            self._refused += 1
            hopeless = not self._answered and self._refused >= _GIVE_UP
        if hopeless:
            raise self._stop(endpoint, f"it refuses every request ({outcome.reason})")

    def _lost_call(self, reason: str) -> Exception:
        with self._lock:
            self._lost += 1
            lost = self._lost
        said = f"The {self.role} {self.name!r} gave no answer ({reason})"
        if lost >= _GIVE_UP:
            return EndpointError(f"{said}, {lost} calls in a row; what was answered is kept: run again when it is up.")
        return LaterError(f"{said}; run again later.")

    def _stop(self, endpoint: EndpointSettings, reason: str) -> EndpointError:
        key = f" and the key in {endpoint.key_env}" if endpoint.key_env else " and key_env"
        return EndpointError(
            f"The {self.role} {self.name!r} at {endpoint.url} cannot be used: {reason}. Check url, model{key}."
        )

    def _headers(self, endpoint: EndpointSettings) -> dict[str, str]:
        key = os.environ.get(endpoint.key_env, "") if endpoint.key_env else ""
        return {"authorization": f"Bearer {key}"} if key else {}


def _price(cost: Cost, endpoint: EndpointSettings, outcome: Reply | Refused) -> Cost:
    if isinstance(outcome, Refused):
        return replace(cost, failures=1)
    money = outcome.prompt_tokens * endpoint.prompt_price + outcome.completion_tokens * endpoint.completion_price
    return replace(
        cost,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
        money=money / 1000,
    )
