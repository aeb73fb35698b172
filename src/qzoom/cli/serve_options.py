"""Options of `qzoom serve`, each described once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from qzoom.serving.settings import ServerLimits

__all__ = ["parse_limits"]

Host = Annotated[str, typer.Option(envvar="QZOOM_HOST", help="Address to listen on; 0.0.0.0 is every network.")]
Port = Annotated[int, typer.Option(envvar="QZOOM_PORT", min=0, max=65535, help="0 takes a free one and says which.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="QZOOM_API_KEY",
        show_default=False,
        show_envvar=True,
        help="Key that clients must send; may be given again. Other users of the machine see the command line, so "
        "prefer the variable.",
    ),
]
ServedName = Annotated[
    str | None,
    typer.Option(envvar="QZOOM_SERVED_MODEL_NAME", show_default=False, help="What clients call the model."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(
        envvar="QZOOM_DTYPE",
        help="Number format of the weights; auto is float32 on a CPU, where answers then do not depend on who else "
        "asks, and the checkpoint's own elsewhere.",
    ),
]
Slots = Annotated[
    int, typer.Option("--slots", envvar="QZOOM_SLOTS", min=1, max=4096, help="Answers made at the same time.")
]
Queue = Annotated[
    int, typer.Option("--queue", envvar="QZOOM_QUEUE", min=1, max=10**6, help="Requests that may wait; then 429.")
]
CacheMb = Annotated[
    int,
    typer.Option(
        "--cache-mb",
        envvar="QZOOM_CACHE_MB",
        min=0,
        max=10**7,
        help="Memory for earlier pictures; 0 is off.",
    ),
]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline-seconds", envvar="QZOOM_DEADLINE_SECONDS", min=0.1, max=86400, help="Most time of one request."
    ),
]
Drain = Annotated[
    float,
    typer.Option(
        "--drain-seconds",
        envvar="QZOOM_DRAIN_SECONDS",
        min=0,
        max=86400,
        help="What running requests get to finish after SIGTERM or Ctrl-C; a second one stops at once.",
    ),
]
MediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-media-domains",
        envvar="QZOOM_ALLOWED_MEDIA_DOMAINS",
        metavar="HOST",
        show_default=False,
        help="Fetch pictures from this host (https); may be given again. Without it only data URLs are taken.",
    ),
]
HttpMedia = Annotated[
    bool,
    typer.Option("--allow-http-media", envvar="QZOOM_ALLOW_HTTP_MEDIA", help="From those hosts also without TLS."),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        envvar="QZOOM_LIMIT",
        metavar="NAME=NUMBER",
        show_default=False,
        help="What a request may cost, such as pictures=4 or body_bytes=8000000; may be given again. "
        "docs/security.md lists the names.",
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option("--log-level", envvar="QZOOM_LOG_LEVEL", help="info has a line per request, on standard error."),
]


def parse_limits(words: list[str] | None) -> ServerLimits:
    """Read NAME=NUMBER words.

    Raises:
        typer.BadParameter: not of that form.
        ConfigError: an unknown name (with the closest known one) or a bad value.
    """
    from qzoom.config import from_mapping
    from qzoom.serving.settings import ServerLimits

    values: dict[str, int | float] = {}
    for word in words or ():
        name, _, number = word.partition("=")
        try:
            values[name] = int(number) if number.isdigit() else float(number)
        except ValueError as error:
            text = f"{word!r} is not NAME=NUMBER, such as pictures=4."
            raise typer.BadParameter(text, param_hint="--limit") from error
    limits: ServerLimits = from_mapping(ServerLimits, values, "--limit")
    return limits
