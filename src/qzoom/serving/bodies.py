"""The body of a request that must be JSON."""

from __future__ import annotations

from starlette.requests import Request

from qzoom.serving.errors import ApiError

__all__ = ["json_body"]


async def json_body(request: Request) -> bytes:
    """The whole body.

    Only `application/json` is taken: a page of another origin cannot send that without the browser asking us first.

    Raises:
        ApiError: status 415.
    """
    kinds = request.headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON; send the header 'Content-Type: application/json'.")
    return await request.body()
