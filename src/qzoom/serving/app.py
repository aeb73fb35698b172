"""The application: middleware, routes, error handlers, the OpenAPI document, and the files of the page at `/`.

A request passes the middleware in this order: origin, address, API key, drain, body limits; then its route.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from qzoom import __version__
from qzoom.errors import QZoomError
from qzoom.serving.errors import ApiError, from_exception, from_status, log_failure
from qzoom.serving.middleware import (
    REQUEST_ID,
    AddressMiddleware,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    DrainMiddleware,
    OriginMiddleware,
)
from qzoom.serving.protocol import ChatRequest, PagesRequest, PerceiveRequest
from qzoom.serving.routes import router
from qzoom.serving.service import Service
from qzoom.serving.settings import ServerSettings

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
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/perceive": PerceiveRequest,
    "/v1/pages": PagesRequest,
}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of one server; its lifespan starts and ends the service."""
    app = FastAPI(
        title="qzoom",
        version=__version__,
        description="OpenAI's chat completions, answered by a vision-language model that zooms.",
        routes=list(router.routes),
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        redirect_slashes=False,  # an answer must not depend on the Host header
        swagger_ui_oauth2_redirect_url=None,
        telemetry={"auto_configure": False},  # whatever the environment names, nothing is reported anywhere
    )
    app.state.service = service
    # Every file of the page is a route of its own, so no path from a request ever reaches the file system.
    for path in sorted(PAGE.rglob("*")):
        if path.suffix in _TYPES:
            name = path.relative_to(PAGE).as_posix()
            address = "/" if name == "index.html" else f"/{name}"
            app.add_api_route(address, _file(path), response_model=None, include_in_schema=False)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_document(app, service.settings))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _no_such_address)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(QZoomError, _refused)
    app.add_exception_handler(Exception, _failed)
    # The last one added is the first that a request meets.
    app.add_middleware(BodyLimitMiddleware, limits=service.settings.limits, on_refusal=service.metrics.rejected)
    app.add_middleware(DrainMiddleware, service=service)
    app.add_middleware(ApiKeyMiddleware, keys=service.settings.api_keys)
    app.add_middleware(AddressMiddleware, root_path=service.settings.root_path)
    app.add_middleware(OriginMiddleware, origins=service.settings.allowed_origins)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.start()
    try:
        yield
    finally:
        await service.close()


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that sends one file, which is read now."""
    data = path.read_bytes()
    headers = {"Content-Security-Policy": _POLICY, "Content-Type": _TYPES[path.suffix], "Cache-Control": "no-cache"}

    async def send(request: Request) -> Response:
        return Response(data, headers=headers)

    return send


def _document(app: FastAPI, settings: ServerSettings) -> dict[str, Any]:
    """FastAPI's OpenAPI document, completed with the request bodies: those are parsed by `protocol`, on a thread."""
    out = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas, ref = out["components"]["schemas"], "#/components/schemas/{model}"
    for path, model in _BODIES.items():
        schema = model.model_json_schema(ref_template=ref)
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"]["enum"] = [settings.model_name]
        schemas[model.__name__] = schema
        content = {"application/json": {"schema": {"$ref": ref.format(model=model.__name__)}}}
        out["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    names = {"type": "string", "enum": [settings.model_name]}
    parameter = {"name": "name", "in": "path", "required": True, "schema": names}
    out["paths"]["/v1/models/{name}"]["get"]["parameters"] = [parameter]
    if settings.root_path:
        out["servers"] = [{"url": settings.root_path}]
    if settings.api_keys:
        out["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        out["security"] = [{"key": []}]
    return out


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = from_status(error.status_code, request.method, request.url.path)
    headers = {name: value.replace("GET", "GET, HEAD") for name, value in (error.headers or {}).items()}
    return _reply(refusal, headers)


async def _refused(request: Request, error: Exception) -> Response:
    log_failure(error, request.scope[REQUEST_ID])
    return _reply(from_exception(error))


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return _reply(from_exception(error))  # the error itself is written to the server's log


def _reply(refusal: ApiError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=(headers or {}) | refusal.headers)
