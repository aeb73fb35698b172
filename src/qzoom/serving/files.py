"""The page at `/`: the files of the folder `page`, read once when the server starts.

Every file is a route of its own, so no path from a request ever reaches the file system.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["page_files", "serve_file"]

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
