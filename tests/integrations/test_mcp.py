import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from PIL import Image

from qzoom.cli.main import run
from qzoom.errors import ConfigError, ImageError
from qzoom.integrations.mcp_server import McpSettings, read_allowed
from tests.pdfs import of_pictures

RECEIPT = Path(__file__).resolve().parents[2] / "examples" / "receipt.jpg"
DATE = "What is the date?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An allowed folder beside one that is not."""
    home = tmp_path_factory.mktemp("mcp")
    inside, outside = home / "in", home / "out"
    inside.mkdir()
    outside.mkdir()
    receipt = Image.open(RECEIPT)
    receipt.save(inside / "receipt.png")
    receipt.save(outside / "secret.png")
    (inside / "pages.pdf").write_bytes(of_pictures([Image.new("RGB", receipt.size, "white"), receipt], dpi=200))
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "good.png").symlink_to(inside / "receipt.png")
    (inside / "door").symlink_to(outside)
    return inside


def call_all(folder: Path, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """Start the server, list its tools and call them in turn."""
    arguments = ["-m", "qzoom", "mcp", "--allow", str(folder), "--crop-side-px", "200"]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))

    async def talk() -> list[Any]:
        async with Client(stdio_client(server)) as client:
            tools = (await client.list_tools()).tools
            assert {tool.name for tool in tools} == {"ask_picture", "look"}
            assert all("crop" in tool.description or "cut out" in tool.description for tool in tools)
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return anyio.run(talk)


def test_both_tools_over_stdio(folder):
    asked, looked, paged, refused, wrong = call_all(
        folder,
        ("ask_picture", {"picture": "receipt.png", "question": DATE, "zoom": "always"}),
        ("look", {"picture": str(folder / "receipt.png"), "question": DATE}),
        ("ask_picture", {"picture": "pages.pdf", "question": DATE, "zoom": "always", "pages": "2"}),
        ("ask_picture", {"picture": "../out/secret.png", "question": DATE}),
        ("look", {"picture": "receipt.png", "question": " "}),
    )
    for result, first in ((asked, 1), (looked, 0), (paged, 1)):
        assert not result.is_error
        facts = json.loads(result.content[first].text)
        crop = Image.open(io.BytesIO(base64.b64decode(result.content[first + 1].data)))
        (x0, y0, x1, y1) = facts["regions"][0]["box"]
        assert result.content[first + 1].mime_type == "image/png"
        assert max(crop.size) == min(200, max(x1 - x0, y1 - y0))
        assert crop.width / crop.height == pytest.approx((x1 - x0) / (y1 - y0), rel=0.1)
    assert asked.content[0].text.strip()
    assert json.loads(paged.content[1].text)["regions"][0]["page"] == 2
    for result, sentence in ((refused, "not a picture file in a folder"), (wrong, "The question is empty")):
        assert result.is_error
        assert sentence in result.content[0].text


@pytest.mark.parametrize(
    "path",
    [
        "../out/secret.png", "link.png", "door/secret.png", "/etc/hostname", "file:///etc/hostname", "~/a.png", "",
        "no.png", "\0", ".", "receipt.png/../../out/secret.png",
    ],
)  # fmt: skip
def test_paths_outside_are_refused_without_telling_whether_they_exist(folder, path):
    with pytest.raises(ImageError, match="it is not a picture file in a folder that this server may read; name one"):
        read_allowed(path, McpSettings(allow=(str(folder),)))


def test_what_may_be_read(folder):
    allowed = McpSettings(allow=(str(folder),))
    whole = f"file://{folder}/receipt.png"
    url = "data:image/png;base64," + base64.b64encode((folder / "receipt.png").read_bytes()).decode()
    for picture in ("receipt.png", "good.png", f"{folder}/../in/receipt.png", whole, url):
        assert read_allowed(picture, allowed)[0].size_px == Image.open(RECEIPT).size
    with pytest.raises(ImageError, match="fetches no pictures from the web"):
        read_allowed("https://example.com/a.png", allowed)
    with pytest.raises(ImageError, match="not on this server's list"):
        read_allowed("https://example.com/a.png", McpSettings(allowed_media_domains=("images.example.com",)))
    os.mkfifo(folder / "pipe")
    with pytest.raises(ImageError, match="not a picture file"):
        read_allowed("pipe", allowed)
    with pytest.raises(ImageError, match=r"more than the limit of 0\.001 megapixels"):
        read_allowed("receipt.png", McpSettings(allow=(str(folder),), max_pixels=1000))


def test_settings(folder, capsys):
    with pytest.raises(ConfigError, match="No picture could be read; allow at least one folder"):
        McpSettings()
    assert run(["mcp", "--allow", str(folder / "nothing")]) == 2
    assert "is not there; name one that exists" in capsys.readouterr().err
    assert run(["mcp"]) == 2
    assert "say what may be read: --allow FOLDER" in capsys.readouterr().err


def test_folders_in_the_environment_are_separated_by_commas_and_may_hold_blanks(folder, capsys, monkeypatch):
    (folder / "My Documents").mkdir()
    monkeypatch.setenv("QZOOM_MCP_ALLOW", f"{folder / 'My Documents'}, {folder / 'not here'}")
    assert run(["mcp"]) == 2
    assert "not here' is not there; name one that exists" in capsys.readouterr().err
    assert run(["mcp", "--allow", str(folder / "nothing")]) == 2  # the option takes precedence
    assert "nothing' is not there" in capsys.readouterr().err
