"""A server of the Model Context Protocol: agents ask about pictures and get the region that was read as a picture.

Pictures come from allowed folders, from allowed hosts, or as data URLs. A path counts as where it really leads, after
`..` and symbolic links, and the file that was opened must be the one that was checked.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL import Image

from qzoom import __version__
from qzoom.errors import ConfigError, QZoomError
from qzoom.images.fetch import FetchPolicy, fetch_image
from qzoom.images.limits import ImageLimits, refuse
from qzoom.images.load import LoadedImage, load_pictures, local_path, shown
from qzoom.model import QZoom
from qzoom.settings import Between, settings
from qzoom.types import Answer, Perception

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

Count = Annotated[int, Between(1)]
_MAX_CROPS = 4


@settings
class McpSettings:
    """What agents may read and what one call may cost."""

    allow: tuple[str, ...] = ()
    """Folders whose pictures and PDFs may be read, with all folders below; may be repeated."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts that pictures may be fetched from, over https; may be repeated."""
    max_pixels: Count = 50_000_000
    """Most pixels of a picture, and of all pages of a PDF together."""
    max_pages: Annotated[int, Between(1, 10_000)] = 32
    """Most pages of a PDF."""
    max_new_tokens: Annotated[int, Between(1, 10**6)] = 128
    """Most tokens of an answer."""
    crop_side_px: Annotated[int, Between(16, 10_000)] = 1024
    """Longest side of the crops that are returned."""

    def __post_init__(self) -> None:
        if not self.allow and not self.allowed_media_domains:
            raise ConfigError("No picture could be read; allow at least one folder (allow) or host.")
        for folder in self.allow:
            if not Path(folder).is_dir():
                raise ConfigError(f"The allowed folder {shown(folder)} is not there; name one that exists.")

    def image_limits(self) -> ImageLimits:
        """What the picture decoder is given."""
        return ImageLimits(max_pixels=self.max_pixels, max_pages=self.max_pages)


def read_allowed(picture: str, allowed: McpSettings, pages: str = "") -> tuple[LoadedImage, ...]:
    """The pictures behind a path, `file://` URL, web address or data URL, if it may be read.

    Raises:
        ImageError: not allowed, or not to be read; whether a file outside exists is not told.
        ConfigError: pages that a PDF does not have.
    """
    scheme, limits = picture[:8].lower(), allowed.image_limits()
    if scheme.startswith("data:"):
        return load_pictures(picture, limits, pages)
    if scheme.startswith(("http://", "https://")):
        policy = FetchPolicy(allowed_hosts=allowed.allowed_media_domains, max_bytes=limits.max_bytes)
        return load_pictures(fetch_image(picture, policy), limits, pages)
    path = local_path(picture) if scheme.startswith("file://") else picture
    with _opened(path, allowed) as file:
        return load_pictures(file, limits, pages)


def _opened(path: str, allowed: McpSettings) -> io.BufferedReader:
    """The open file of a path inside an allowed folder; a relative path begins in the first of them."""
    folders = [Path(folder).resolve() for folder in allowed.allow]
    refusal = refuse(shown(path), "it is not a picture file in a folder that this server may read", "name one that is")
    try:
        place = Path(folders[0], path).resolve(strict=True) if folders and path else None
        if place is None or not any(place.is_relative_to(folder) for folder in folders):
            raise refusal
        number = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError, RuntimeError) as error:
        raise refusal from error
    # A folder on the way may have become a link since it was checked.
    with suppress(OSError):
        status = os.fstat(number)
        if stat.S_ISREG(status.st_mode) and place.resolve() == place and os.path.samestat(status, place.lstat()):
            return os.fdopen(number, "rb")
    os.close(number)
    raise refusal


def make_server(model: QZoom, allowed: McpSettings) -> MCPServer[Any]:
    """The server with its two tools."""
    import anyio.to_thread
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server: MCPServer[Any] = MCPServer(
        "qzoom",
        version=__version__,
        log_level="ERROR",
        instructions="Reads small print in pictures and PDFs: it looks coarsely first and zooms into the region that a "
        "question is about. Boxes are [x0, y0, x1, y1] in pixels of the original, half-open.",
    )

    async def pictures_of(picture: str, pages: str) -> list[LoadedImage]:
        return list(await anyio.to_thread.run_sync(lambda: read_allowed(picture, allowed, pages)))

    @server.tool(structured_output=False)
    async def ask_picture(
        picture: str, question: str, pages: str = "", zoom: Literal["auto", "never", "always"] = "auto"
    ) -> list[Any]:
        """Answer a question about a picture or PDF. Returns the answer, then gate and regions as JSON, then every
        region that was read, cut out of the original.

        Args:
            picture: a path, a web address or a data URL.
            question: short and about one thing.
            pages: of a PDF, such as "1-5,9"; all if empty.
            zoom: "auto" lets the model decide.
        """
        try:
            images = await pictures_of(picture, pages)
            answer = await model.ask_async(images, question, zoom=zoom, max_new_tokens=allowed.max_new_tokens)
        except QZoomError as error:
            raise ToolError(str(error)) from error
        return [answer.text, *_evidence(answer, images, allowed)]

    @server.tool(structured_output=False)
    async def look(picture: str, question: str, pages: str = "") -> list[Any]:
        """Find where a picture or PDF shows what a question is about, without answering it. Returns boxes as JSON, then
        every region, cut out of the original at full resolution: crop before downscale.

        Args:
            picture: a path, a web address or a data URL.
            question: what to look for.
            pages: of a PDF, such as "1-5,9"; all if empty.
        """
        try:
            images = await pictures_of(picture, pages)
            seen = await anyio.to_thread.run_sync(lambda: model.perceive(images, question))
        except QZoomError as error:
            raise ToolError(str(error)) from error
        return _evidence(seen, images, allowed)

    return server


def _evidence(seen: Answer | Perception, images: Sequence[LoadedImage], allowed: McpSettings) -> list[Any]:
    """Gate, regions and sizes as JSON, then the crops."""
    from mcp.server.mcpserver import Image as ImageContent

    record = seen.to_dict()
    facts = {name: record[name] for name in ("gate", "regions", "image_sizes_px")}
    facts["notes"] = [note for image in images for note in image.notes]
    crops: list[Any] = []
    for region in seen.regions[:_MAX_CROPS]:
        crop = images[region.image].image.crop(region.box)
        crop.thumbnail((allowed.crop_side_px, allowed.crop_side_px), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        crop.save(out, "PNG")
        crops.append(ImageContent(data=out.getvalue(), format="png"))
    return [json.dumps(facts), *crops]
