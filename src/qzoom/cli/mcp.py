"""`qzoom mcp`: tools for agents, over standard input and output."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer

from qzoom.cli.console import Console
from qzoom.cli.flags import Flags, build_settings, flatten
from qzoom.cli.options import ModelOptions
from qzoom.errors import ConfigError
from qzoom.integrations.mcp_server import McpSettings, make_server


@flatten
def mcp(
    *, model: ModelOptions, given: Annotated[dict[str, Any], Flags("QZOOM_MCP_", recipe=False, of=McpSettings)]
) -> None:
    """Serve the tools ask_picture and look to agents (Model Context Protocol, standard input and output).

    Both return the region as a picture, cut out of the original: agents get crop before downscale.

    Example: qzoom mcp --allow ~/Documents
    """
    if find_spec("mcp") is None:
        raise ConfigError("This needs the package mcp; install it with: pip install 'qzoom[mcp]'.")
    if not given.get("allow") and not given.get("allowed_media_domains"):
        raise typer.BadParameter("say what may be read: --allow FOLDER, or --allowed-media-domains HOST.")
    allowed = build_settings(McpSettings, given)
    Console(quiet=True).hush_libraries()
    make_server(model.load(), allowed).run("stdio")
