"""`qzoom serve`: the model behind OpenAI's HTTP interface, and a web page."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli.console import Console
from qzoom.cli.engines import EngineOptions
from qzoom.cli.flags import Flags, build_settings, flatten, optional
from qzoom.cli.options import ModelOptions
from qzoom.errors import ConfigError
from qzoom.keys import read_keys
from qzoom.serving.settings import ServerLimits, ServerSettings
from qzoom.settings import setting_fields

if TYPE_CHECKING:
    from qzoom.serving.engines.base import ServingEngine
    from qzoom.serving.server import DrainingServer

_KEYS = "QZOOM_API_KEY"
_FIELDS = {
    "model_name": "--served-model-name",
    "scheduler.slots": "--slots",
    "scheduler.queue": "--queue",
    "deadline_s": "--deadline-seconds",
    "drain_s": "--drain-seconds",
    "allowed_origins": "--allowed-origins",
    "root_path": "--root-path",
    "strict_max_tokens": "--strict-max-tokens",
    "fetch.allowed_hosts": "--allowed-media-domains",
    "fetch.allow_http": "--allow-http-media",
}


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Where the server listens and what it logs, and settings that are written in another unit or form."""

    host: Annotated[
        str, typer.Option(envvar="QZOOM_SERVE_HOST", help="Address to listen on; 0.0.0.0 listens on every network.")
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            envvar="QZOOM_SERVE_PORT", min=0, max=65535, help="Port to listen on; 0 takes a free port and prints it."
        ),
    ] = 8000
    api_key: Annotated[
        list[str] | None,
        optional(
            "Key that clients must send; may be repeated. Other users of the machine can see the command "
            f"line, so prefer the environment variable {_KEYS} (several keys: with commas or blanks between them).",
        ),
    ] = None
    cache_mb: Annotated[
        int,
        typer.Option(
            envvar="QZOOM_SERVE_CACHE_MB",
            min=0,
            max=10**7,
            help="Memory in MB for earlier images; 0 turns the cache off.",
        ),
    ] = 256
    limit: Annotated[
        list[str] | None,
        optional(
            "Limit of a request, such as pictures=4 or body_bytes=8000000; may be repeated. docs/security.md "
            "lists the names.",
            envvar="QZOOM_SERVE_LIMIT",
            metavar="NAME=NUMBER",
        ),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(envvar="QZOOM_SERVE_LOG_LEVEL", help="Log level; info logs every request to standard error."),
    ] = "info"


@flatten
def serve(
    *,
    model: ModelOptions,
    engine: EngineOptions,
    network: NetworkOptions,
    given: Annotated[dict[str, Any], Flags("QZOOM_SERVE_", tuple(_FIELDS), _FIELDS, recipe=False, of=ServerSettings)],
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, and a page at / to try it.

    The address is printed to standard output when the server is ready; everything else goes to standard error. The
    first SIGTERM or Ctrl-C lets running requests finish, a second one stops at once. On a CPU --dtype auto is float32,
    so that answers do not depend on other requests.

    Example: qzoom serve --port 8000 --api-key "$KEY"
    """
    _need_libraries()
    engine.check(model)
    from qzoom.serving.server import bind

    try:
        keys = network.api_key or list(read_keys(_KEYS))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    values = {"model_name": public_name(model.model)} | given
    values |= {"api_keys": keys, "limits": parse_limits(network.limit)}
    values["scheduler"] = {"cache_bytes": network.cache_mb * 2**20} | given.get("scheduler", {})
    limits = {f"limits.{field.name}": f"--limit {field.name}" for field in setting_fields(ServerLimits)}
    settings = build_settings(ServerSettings, values, names=_FIELDS | limits)
    _run(bind(network.host, network.port), settings, partial(engine.start, model, settings), network.log_level)


def parse_limits(words: list[str] | None) -> dict[str, int | float]:
    """Read NAME=NUMBER words (typer.BadParameter: not of that form)."""
    values: dict[str, int | float] = {}
    for word in words or ():
        name, _, number = word.partition("=")
        try:
            values[name] = int(number) if number.isdigit() else float(number)
        except ValueError as error:
            text = f"{word!r} is not NAME=NUMBER, such as pictures=4."
            raise typer.BadParameter(text, param_hint="--limit") from error
    return values


def _run(listener: socket.socket, settings: ServerSettings, start: Callable[[], ServingEngine], log_level: str) -> None:
    """Start the engine, serve until a signal, and turn the signal into an exit code."""
    from qzoom.serving.memory import limit_arenas, settle
    from qzoom.serving.server import DrainingServer
    from qzoom.serving.service import Service

    limit_arenas()
    console = Console()
    with console.waiting(f"loading {settings.model_name} ..."):
        console.hush_libraries()
        engine = start()
        settle()
    url = _url(listener)
    if not settings.api_keys and not _is_local(listener):
        console.note(f"note    {url} is open to everyone who can reach it; give --api-key to change that")
    server = DrainingServer(Service(engine, settings), lambda: console.result(f"qzoom serves {url}"), log_level)
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

    missing = [name for name in ("fastapi", "httpx", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"Serving needs {', '.join(missing)}; install them with: pip install 'qzoom[serve]'.")


def public_name(model: str) -> str:
    """What clients see: the embedded model and a hub id as they are, of a folder only its name."""
    from qzoom.checkpoints.hub import EMBEDDED

    path = Path(model)
    return path.resolve().name if model != EMBEDDED and path.is_dir() else model


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
