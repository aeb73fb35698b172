"""Client for language models behind OpenAI-compatible endpoints.

    messages -> key -> cache -> (endpoints in turn, with retries) -> reply, stored before it is returned

The `openai` package sends the requests and keeps the connections. Here replies are paid once (`CallCache`), a failing
endpoint is followed by the next one, budgets count every request, and a time limit holds for the whole of a request
(HTTP libraries' timeouts start anew with every byte). Permanent failures end the run with role, address and reason.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import hashlib
import importlib.util
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from qzoom.errors import CallRefusedError, ConfigError, EndpointError, LaterError, StopRunError
from qzoom.images.load import png_data_url
from qzoom.keys import read_key
from qzoom.llm.cache import ENDED, CallCache, Cost, Failure, Reply
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling

_KEY_SCHEMA = 1
_ALL_REFUSED = 3
"""First calls that are all refused before the run stops."""
_TRANSIENT = {408, 409, 425, 429}
_REFUSED = {400, 413, 422, 451}
_UNKNOWN_MODEL = ("model_not_found", "model not found", "does not exist", "unknown model")


class ChatImage:
    """An image of a message, sent as PNG. Its digest is that of the pixels, so equal crops are equal calls. `image`:
    RGB; not changed. `max_pixels`: larger images are scaled down to it."""

    def __init__(self, image: Image.Image, max_pixels: int) -> None:
        self._image = image
        self._max_pixels = max_pixels
        self._url = ""
        self._lock = threading.Lock()
        width, height = image.size
        content = f"{width}x{height}/{min(max_pixels, width * height)}/".encode() + image.convert("RGB").tobytes()
        self.digest = hashlib.sha256(content).hexdigest()

    def url(self) -> str:
        """The image as a data URL; encoded at the first call."""
        with self._lock:
            if not self._url:
                self._url = png_data_url(self._scaled())
            return self._url

    def _scaled(self) -> Image.Image:
        width, height = self._image.size
        image = self._image.convert("RGB")
        if width * height <= self._max_pixels:
            return image
        share = math.sqrt(self._max_pixels / (width * height))
        size = (max(1, math.floor(width * share)), max(1, math.floor(height * share)))
        return image.resize(size, Image.Resampling.LANCZOS)


Message = tuple[str, tuple[str | ChatImage, ...]]
"""One message of a chat: its role ("system" or "user"), texts and images in order."""


def wire(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the format of the chat completions API."""
    return [{"role": role, "content": _content(parts)} for role, parts in messages]


def _content(parts: Sequence[str | ChatImage]) -> Any:
    if len(parts) == 1 and isinstance(parts[0], str):
        return _utf8(parts[0])
    return [
        {"type": "text", "text": _utf8(part)}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.url()}}
        for part in parts
    ]


def _utf8(text: str) -> str:
    """The text without lone surrogates, which no request can hold."""
    return text.encode("utf-8", "replace").decode()


def call_key(
    name: str, endpoint: EndpointSettings, messages: Sequence[Message], sampling: Sampling, sample: int
) -> str:
    """Hex digest of everything that decides a reply. `name`: of the role's member, since two members may serve
    different weights under one model name. `endpoint`: whose model and extra fields count; its address does not."""
    chat = [
        [role, [part if isinstance(part, str) else {"picture": part.digest} for part in parts]]
        for role, parts in messages
    ]
    drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.send_seed]
    content = [_KEY_SCHEMA, name, endpoint.model, chat, drawn, dict(endpoint.extra_body), sample]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class SharedClient:
    """What all clients of a run share: cache, connections, retries and budgets. Threads may share it (ConfigError: the
    package `openai` is not installed)."""

    def __init__(self, cache: CallCache, calls: CallSettings) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError("Endpoints need the package openai; install it with: pip install 'qzoom[distill]'.")
        self.cache = cache
        self.calls = calls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._http: Any = None
        self._lock = threading.Lock()

    def complete(
        self, endpoint: EndpointSettings, messages: Sequence[Message], fields: Mapping[str, Any]
    ) -> Reply | Failure:
        """Send one chat completion request (StopRunError: the run was ended meanwhile)."""
        api, headers = self._api(endpoint)
        chat: Any = wire(messages)
        request = api.chat.completions.with_raw_response.create(
            model=endpoint.model, messages=chat, extra_headers=headers, extra_body={**fields, **endpoint.extra_body}
        )
        status, retry_after, body = self._run(request, endpoint.timeout_s)
        return Failure("transient", body.decode()) if status == 0 else read_reply(status, retry_after, body)

    def reach(self, endpoint: EndpointSettings) -> tuple[int, str]:
        """Ask an endpoint for its models, to see whether it is there. Returns the HTTP status and "", or 0 and why
        there is no response."""
        api, headers = self._api(endpoint)
        status, _, body = self._run(api.models.with_raw_response.list(extra_headers=headers), self.calls.connect_s)
        return status, body.decode() if status == 0 else ""

    def end(self, *, cancel: bool) -> None:
        """End the run: nothing new is sent, and who waits gets a StopRunError. `cancel`: requests under way are given
        up; otherwise their replies are still stored."""
        self.cache.end()
        if cancel:
            self.disconnect()

    def disconnect(self) -> None:
        """Cancel requests under way and close connections and thread; a later request opens new ones."""
        with self._lock:
            loop, thread, http = self._loop, self._thread, self._http
            self._loop = self._thread = self._http = None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_finish(http), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    def close(self) -> None:
        """Close connections and cache."""
        self.disconnect()
        self.cache.close()

    def _api(self, endpoint: EndpointSettings) -> tuple[Any, dict[str, Any]]:
        """The openai client of an endpoint, and headers that keep its environment variables from being sent there."""
        from openai import AsyncOpenAI, Omit

        key = _key(endpoint)
        headers: dict[str, Any] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        if not key:
            headers["Authorization"] = Omit()
        api = AsyncOpenAI(
            base_url=endpoint.url, api_key=key or "none", timeout=None, max_retries=0, http_client=self._connections()
        )
        return api, headers

    def _connections(self) -> Any:
        """The pool of connections, opened at first use. Redirects are refused: they would send the key elsewhere."""
        from openai import DefaultAsyncHttpxClient

        self.cache.pause(0)  # nothing is sent after the end
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._http = DefaultAsyncHttpxClient(follow_redirects=False, timeout=None)
                self._thread = threading.Thread(target=self._loop.run_forever, name="qzoom-endpoints", daemon=True)
                self._thread.start()
            return self._http

    def _run(self, request: Coroutine[Any, Any, Any], timeout_s: float) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body of a response; status 0 and the reason when there is none."""
        from openai import APIConnectionError, APIStatusError

        async def limited() -> Any:
            return await asyncio.wait_for(request, timeout_s)

        with self._lock:  # before or after `disconnect`, whose last task cancels all that were begun before it
            if self._loop is None:
                request.close()
                raise StopRunError(ENDED)
            future: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(limited(), self._loop)
        try:
            response = future.result().http_response
        except APIStatusError as error:
            response = error.response
        except TimeoutError:
            return 0, None, f"no full reply within {timeout_s:g} s".encode()
        except (APIConnectionError, OSError) as error:
            return 0, None, f"no connection ({_cause(error)})".encode()
        except concurrent.futures.CancelledError as error:
            request.close()
            raise StopRunError(ENDED) from error
        except BaseException:
            future.cancel()
            raise
        return response.status_code, response.headers.get("retry-after"), response.content


async def _finish(http: Any) -> None:
    """Cancel all requests, so that nobody waits for them, and close the connections."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await http.aclose()


def _key(endpoint: EndpointSettings) -> str:
    return read_key(endpoint.key_env) if endpoint.key_env else ""


def _cause(error: BaseException) -> str:
    """The HTTP library's own error, which `openai` wraps in a general one."""
    error = error.__cause__ or error
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


class Client:
    """One member of a role; threads may share it."""

    def __init__(
        self, role: str, name: str, endpoints: Sequence[EndpointSettings], sampling: Sampling, shared: SharedClient
    ) -> None:
        self.role = role
        self.name = name
        self.endpoints = tuple(endpoints)
        self.sampling = sampling
        self.shared = shared
        self._turns = itertools.count()
        self._rests = [0.0 for _ in self.endpoints]
        self._lock = threading.Lock()
        self._lost = self._refused = 0
        self._answered: set[str] | None = None  # addresses that gave a reply, in earlier runs with this cache too
        self._held: dict[str, dict[str, Failure]] = {}  # refusals of the others, by address and key of the call

    @property
    def model(self) -> str:
        """Name of the member and of its model, for records."""
        model = self.endpoints[0].model
        return model if model == self.name else f"{self.name}: {model}"

    def check(self) -> None:
        """Make sure that every endpoint is there (EndpointError: one is down or refuses the key, or there is no key;
        ConfigError: a key that no header can carry)."""
        for endpoint in self.endpoints:
            if endpoint.key_env and not _key(endpoint):
                raise self._stop(endpoint, f"the environment variable {endpoint.key_env} holds no key")
            status, reason = self.shared.reach(endpoint)
            if status == 0:
                status, reason = self.shared.reach(endpoint)
            if status == 0:
                raise EndpointError(
                    f"The {self.role} {self.name!r} at {endpoint.url} is down: {reason}; start it or correct its url."
                )
            if status in (401, 403):
                raise self._stop(endpoint, f"it refuses the key (HTTP {status})")

    def call(self, messages: Sequence[Message], sample: int = 0) -> Reply:
        """The reply to a chat, from the cache or paid now.

        Args:
            sample: its number; other numbers are other calls.

        Raises:
            CallRefusedError: the endpoint refuses this chat permanently.
            LaterError: no endpoint answered for too long.
            EndpointError: no call can succeed.
            BudgetSpentError: a budget is used up.
        """
        key = call_key(self.name, self.endpoints[0], messages, self.sampling, sample)
        cache = self.shared.cache
        outcome = self._find(key)
        if outcome is None:
            with cache.claim(key):
                outcome = self._find(key)
                if outcome is None:
                    return self._unwrap(self._pay(key, messages, sample))
        cache.count(Cost(self.role, self.name, "", kept=1))
        return self._unwrap(outcome)

    def _find(self, key: str) -> Reply | Failure | None:
        """The known outcome of a call."""
        with self._lock:
            held = next((calls[key] for calls in self._held.values() if key in calls), None)
        return held or self.shared.cache.find(key)

    def _unwrap(self, outcome: Reply | Failure) -> Reply:
        if isinstance(outcome, Failure):
            raise CallRefusedError(f"The {self.role} {self.name!r} refuses the request: {outcome.reason}")
        return outcome

    def _pay(self, key: str, messages: Sequence[Message], sample: int) -> Reply | Failure:
        """Ask the endpoints until there is a reply or a refusal, and keep it."""
        shared, turn = self.shared, next(self._turns)
        tries = [0 for _ in self.endpoints]
        free_at = [0.0 for _ in self.endpoints]
        reason = "it asks for a longer pause than longest_s"
        for _ in range(shared.calls.retries + 1):
            number = self._choose(turn, free_at, tries)
            if number is None:
                break
            endpoint = self.endpoints[number]
            cost = Cost(self.role, self.name, endpoint.url)
            with shared.cache.slot(endpoint):
                shared.cache.reserve(replace(cost, requests=1), shared.calls)
                outcome = shared.complete(endpoint, messages, self.sampling.fields(sample))
            if isinstance(outcome, Failure) and outcome.kind != "refused":
                shared.cache.count(replace(cost, failures=1))
                if outcome.kind == "fatal":
                    raise self._stop(endpoint, outcome.reason)
                free_at[number] = self._pause(number, tries[number], outcome)
                tries[number] += 1
                reason = f"tries: {sum(tries)}, last at {endpoint.url}: {outcome.reason}"
                continue
            self._keep(key, outcome, endpoint)
            return outcome
        raise self._lost_call(reason)

    def _choose(self, turn: int, free_at: Sequence[float], tries: Sequence[int]) -> int | None:
        """The next endpoint, after a pause if all need one; None when the pause would be too long."""
        order = [(turn + i) % len(self.endpoints) for i in range(len(self.endpoints))]
        with self._lock:
            ready = {i: max(free_at[i], self._rests[i]) for i in order}
        number = min(order, key=lambda i: (max(0.0, ready[i] - time.monotonic()), tries[i]))
        wait = ready[number] - time.monotonic()
        if wait > self.shared.calls.longest_s:
            return None
        self.shared.cache.pause(wait)
        return number

    def _pause(self, number: int, tried: int, failure: Failure) -> float:
        """When this call may return to an endpoint. A pause that the endpoint asks for holds for all calls."""
        calls = self.shared.calls
        now = time.monotonic()
        pause = random.uniform(0, min(calls.longest_s, calls.backoff_s * 2 ** min(tried, 60)))
        if failure.wait_s is None:
            return now + pause
        with self._lock:
            self._rests[number] = max(self._rests[number], now + failure.wait_s)
        return now + max(failure.wait_s, pause)

    def _keep(self, key: str, outcome: Reply | Failure, endpoint: EndpointSettings) -> None:
        """Store replies and refusals. An endpoint that has not answered yet may be set up wrongly, so its refusals are
        stored with its first reply; a member that has only ever been refused ends the run, and nothing is stored."""
        url, cache, answered = endpoint.url, self.shared.cache, self._answering()
        cost = _price(Cost(self.role, self.name, url), endpoint, outcome)
        due: dict[str, Failure] = {}
        with self._lock:
            self._lost = 0
            if isinstance(outcome, Reply):
                answered.add(url)
                due = self._held.pop(url, {})
            else:
                self._refused += 1
                if url not in answered:
                    self._held.setdefault(url, {})[key] = outcome
            held = key in self._held.get(url, {})
            hopeless = not answered and self._refused >= _ALL_REFUSED
            if hopeless:
                self._held.clear()
        for other, failure in due.items():
            cache.store(other, failure, Cost(self.role, self.name, url))
        if held:
            cache.count(cost)
        else:
            cache.store(key, outcome, cost)
        if hopeless and isinstance(outcome, Failure):
            raise self._stop(endpoint, f"it refuses every request ({outcome.reason})")

    def _answering(self) -> set[str]:
        """Addresses that have given this member a reply."""
        with self._lock:
            if self._answered is None:
                self._answered = self.shared.cache.answered(self.role, self.name)
            return self._answered

    def _lost_call(self, reason: str) -> Exception:
        with self._lock:
            self._lost += 1
            lost = self._lost
        text = f"The {self.role} {self.name!r} gave no answer ({reason})"
        if self.shared.calls.give_up and lost >= self.shared.calls.give_up:
            return EndpointError(f"{text}, {lost} calls in a row; what was answered is kept: run again when it is up.")
        return LaterError(f"{text}; run again later.")

    def _stop(self, endpoint: EndpointSettings, reason: str) -> EndpointError:
        key = f" and the key in {endpoint.key_env}" if endpoint.key_env else " and key_env"
        return EndpointError(
            f"The {self.role} {self.name!r} at {endpoint.url} cannot be used: {reason}. Check url, model{key}."
        )


def _price(cost: Cost, endpoint: EndpointSettings, outcome: Reply | Failure) -> Cost:
    if isinstance(outcome, Failure):
        return replace(cost, failures=1)
    money = outcome.prompt_tokens * endpoint.prompt_price + outcome.completion_tokens * endpoint.completion_price
    return replace(
        cost, prompt_tokens=outcome.prompt_tokens, completion_tokens=outcome.completion_tokens, money=money / 1000
    )


def read_reply(status: int, retry_after: str | None, body: bytes) -> Reply | Failure:
    """What a response means."""
    if 200 <= status < 300:
        return _completion(body)
    if status in _TRANSIENT or status >= 500:
        return Failure("transient", f"HTTP {status}", _wait(retry_after))
    complaint = _message(body)
    more = f": {complaint}" if complaint else ""
    if status in (401, 403):
        return Failure("fatal", f"it refuses the key (HTTP {status})")
    if status in _REFUSED and not any(word in complaint.casefold() for word in _UNKNOWN_MODEL):
        return Failure("refused", f"HTTP {status}{more}")
    if status in (400, 404):
        return Failure("fatal", f"it does not know the model or the address (HTTP {status}){more}")
    return Failure("fatal", f"HTTP {status}{more}")


def _completion(body: bytes) -> Reply | Failure:
    try:
        value: Any = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"]["content"]
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is None:
            text = choice["message"].get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Failure("transient", "a reply that is no chat completion")
    if not isinstance(text, str):
        return Failure("transient", "a reply that is no chat completion")
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    model = value.get("model")
    return Reply(
        text.encode("utf-8", "replace").decode(),
        choice.get("finish_reason") == "length",
        model if isinstance(model, str) else "",
        _tokens(usage.get("prompt_tokens")),
        _tokens(usage.get("completion_tokens")),
    )


def _tokens(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _message(body: bytes) -> str:
    """What an error body says, on one line, cut where it is long."""
    try:
        error = json.loads(body).get("error", "")
        complaint = error.get("message", "") if isinstance(error, dict) else error
        if isinstance(error, dict) and isinstance(error.get("code"), str):
            complaint = f"{complaint} ({error['code']})"
    except (ValueError, AttributeError, RecursionError):
        complaint = body[:200].decode("utf-8", "replace")
    return " ".join(str(complaint).split())[:200]


def _wait(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
