"""`qzoom serve`: the model behind OpenAI's HTTP interface, and a page to look at."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qzoom.cli import options
from qzoom.cli import serve_options as own
from qzoom.cli.console import Console

if TYPE_CHECKING:
    import socket

    from qzoom.serving.server import DrainingServer
    from qzoom.serving.settings import ServerSettings

__all__ = ["serve"]


def serve(
    model: options.Model = "tiny",
    host: own.Host = "127.0.0.1",
    port: own.Port = 8000,
    api_key: own.ApiKey = None,
    served_model_name: own.ServedName = None,
    dtype: own.Dtype = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    slots: own.Slots = 16,
    queue: own.Queue = 64,
    cache_mb: own.CacheMb = 256,
    deadline_seconds: own.Deadline = 120,
    drain_seconds: own.Drain = 30,
    allowed_media_domains: own.MediaDomains = None,
    allow_http_media: own.HttpMedia = False,
    limit: own.Limit = None,
    log_level: own.LogLevel = "info",
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, and a page at / to try it.

    Prints its address on standard output once it answers; everything else goes to standard error. The first SIGTERM or
    Ctrl-C lets running requests finish, a second one stops at once.

    Example: qzoom serve --port 8000 --api-key "$KEY"
    """
    _need_libraries()
    from qzoom.images.fetch import FetchPolicy
    from qzoom.serving.server import bind
    from qzoom.serving.settings import SchedulerLimits, ServerSettings

    if os.environ.get("QZOOM_API_KEY") == "" and not api_key:
        raise typer.BadParameter("QZOOM_API_KEY is set but empty; unset it, or put a key into it.")
    settings = ServerSettings(
        model_name=served_model_name or _public_name(model),
        api_keys=tuple(api_key or ()),
        limits=own.parse_limits(limit),
        scheduler=SchedulerLimits(slots=slots, queue=queue, cache_bytes=cache_mb * 2**20),
        fetch=FetchPolicy(allowed_hosts=tuple(allowed_media_domains or ()), allow_http=allow_http_media),
        deadline_s=deadline_seconds,
        drain_s=drain_seconds,
    )
    _run(bind(host, port), settings, (model, revision, device, dtype), log_level)


def _run(listener: socket.socket, settings: ServerSettings, source: tuple[str, str | None, str, str], log: str) -> None:
    """Load the model, serve until a signal, and turn the signal into an exit code."""

    from qzoom.checkpoints.base import choose_device
    from qzoom.cli.loading import load_model
    from qzoom.serving.scheduler import limit_arenas, settle
    from qzoom.serving.server import DrainingServer
    from qzoom.serving.service import Service

    limit_arenas()
    console = Console()
    model, revision, device, dtype = source
    device = str(choose_device(device)) if device == "auto" else device
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    with console.waiting(f"loading {model} ..."):
        console.hush_libraries()
        reader = load_model(model, revision, device, dtype)
        settle()
    url = _url(listener)
    if not settings.api_keys and not _is_local(listener):
        console.note(f"note    {url} is open to everyone who can reach it; give --api-key to change that")
    server = DrainingServer(Service(reader, settings), lambda: console.result(f"qzoom serves {url}"), log)
    server.run(sockets=[listener])
    _exit(server)


def _exit(server: DrainingServer) -> None:
    if server.force_exit:
        sys.stdout.flush()
        os._exit(130 if server.signal == signal.SIGINT else 1)  # a step of the worker may still run
    if server.signal == signal.SIGINT:
        raise typer.Exit(130)


def _need_libraries() -> None:
    from importlib.util import find_spec

    from qzoom.errors import ConfigError

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"Serving needs {', '.join(missing)}; install them with: pip install 'qzoom[serve]'.")


def _public_name(model: str) -> str:
    """What clients see: a hub id as it is, of a folder only its name."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(listener: socket.socket) -> bool:
    import ipaddress

    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
