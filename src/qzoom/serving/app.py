"""The application: addresses, what stands before them, and the shape of refusals.

A request passes the key (`auth`), the admission (`admit`), the body's limits (`guard`), and then its route.

The page at `/`: the files of the folder `page`, read once when the server starts.

Every file is a route of its own, so no path from a request ever reaches the file system.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qzoom import __version__
from qzoom.errors import QZoomError
from qzoom.serving import replies, routes
from qzoom.serving.errors import ApiError, from_exception, from_status, log_failure
from qzoom.serving.middleware import Admission, BodyGuard, KeyGate
from qzoom.serving.protocol import describe
from qzoom.serving.routes import ClientGoneError, chat_completions, perceive
from qzoom.serving.service import Service

__all__ = ["create_app", "page_files", "serve_file"]


_REFUSALS = (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)


def create_app(service: Service) -> FastAPI:
    """The ASGI application of one server; its lifespan starts and ends the service.

    Args:
        service: not started yet.
    """
    app = FastAPI(
        title="qzoom",
        version=__version__,
        description="OpenAI's chat completions, answered by a vision-language model that zooms.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        swagger_ui_oauth2_redirect_url=None,
        telemetry={"auto_configure": False},  # whatever the environment names, nothing is reported anywhere
    )
    app.state.service = service
    _add_routes(app)
    describe(app, model_name=service.settings.model_name, with_keys=bool(service.settings.api_keys))
    app.add_exception_handler(HTTPException, _no_such_address)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(QZoomError, _refused)
    app.add_exception_handler(Exception, _failed)
    # The last one added is the first that a request meets.
    app.add_middleware(BodyGuard, limits=service.settings.limits, on_refusal=service.metrics.rejected)
    app.add_middleware(Admission, service=service)
    app.add_middleware(KeyGate, keys=service.settings.api_keys)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.start()
    try:
        yield
    finally:
        await service.close()


def _add_routes(app: FastAPI) -> None:
    def add(path: str, endpoint: Any, reply: Any, *refusals: int, method: str = "GET", **more: Any) -> None:
        responses: dict[int | str, dict[str, Any]] = {
            number: {"model": replies.ErrorReply} for number in (*refusals, 401)
        }
        responses[200] = {"model": reply} if reply else {}
        responses |= more.pop("responses", {})
        app.add_api_route(path, endpoint, methods=[method], response_model=None, responses=responses, **more)

    stream = {200: {"model": replies.ChatCompletion, "content": {"text/event-stream": {}}}}
    ready = {503: {"model": replies.StatusReply}}
    add("/v1/chat/completions", chat_completions, None, *_REFUSALS, method="POST", responses=stream)
    add("/v1/perceive", perceive, replies.PerceptionReply, *_REFUSALS, method="POST")
    add("/v1/models", routes.models, replies.ModelList)
    add("/v1/models/{name:path}", routes.model, replies.ModelCard, 404)
    add("/health", routes.health, replies.StatusReply)
    add("/ready", routes.ready, replies.StatusReply, responses=ready)
    add("/version", routes.version, replies.VersionReply)
    add("/metrics", routes.metrics, None, response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    for path, file in page_files():
        app.add_api_route(path, serve_file(file), response_model=None, include_in_schema=False)


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = from_status(error.status_code, request.method, request.url.path)
    return _reply(refusal, dict(error.headers or {}))


async def _refused(request: Request, error: Exception) -> Response:
    log_failure(error)
    return _reply(from_exception(error))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return _reply(from_exception(error))  # the error itself goes on to the server's log


def _reply(refusal: ApiError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=(headers or {}) | refusal.headers)


PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_files(folder: Path = PAGE) -> Iterator[tuple[str, Path]]:
    """Addresses and files of the page; the start page's address is `/`.

    Args:
        folder: files of unknown endings in it are left out.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _TYPES:
            name = path.relative_to(folder).as_posix()
            yield ("/" if name == "index.html" else f"/{name}"), path


def serve_file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that sends one file.

    Args:
        path: read now, not at each request.
    """
    data, kind = path.read_bytes(), _TYPES[path.suffix]
    headers = {"Content-Security-Policy": _POLICY, "Content-Type": kind, "Cache-Control": "no-cache"}

    async def send(request: Request) -> Response:
        return Response(data, headers=headers)

    return send
