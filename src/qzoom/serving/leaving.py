"""Clients that leave: what is done for them is cancelled at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from qzoom.errors import QZoomError

__all__ = ["ClientGoneError", "unless_gone"]

Result = TypeVar("Result")


class ClientGoneError(QZoomError):
    """Nobody is left to read the answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes the connection first.

    Args:
        request: its body must have been read.
        work: cleans up after itself when cancelled.

    Raises:
        ClientGoneError: the client left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("The client left.")
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
