"""One HTTP request with a time limit that holds for all of it.

A library's timeouts start anew with every byte that arrives, so that a server which drips holds a thread for ever.
Requests run on an event loop of their own, where the whole of each can be cancelled.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Mapping
from typing import Any

from qzoom.distill.endpoints.replies import Outcome, Passing, read_reply
from qzoom.distill.steps import StopRunError

__all__ = ["Transport"]

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
