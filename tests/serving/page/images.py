"""Takes the pictures of the page that the documentation shows: an answer, the comparison, a phone in the dark.

    python -m tests.serving.page.images docs/images

They need Chromium; with the typeface Inter installed they look best.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.serving.page.browser import chromium, done, server

DESKTOP = {"viewport": {"width": 1280, "height": 1010}, "device_scale_factor": 1.2}
PHONE = {
    "viewport": {"width": 400, "height": 860}, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True,
    "color_scheme": "dark",
}  # fmt: skip


def main(folder: Path) -> None:
    """Write page-answer.png, page-compare.png and page-phone.png."""
    with server() as url, chromium() as browser:
        page = answered(browser, url, 0, DESKTOP)
        save(page.screenshot(), folder / "page-answer.png")
        page.locator("#compare").click()
        page.locator(".column[aria-busy=false]").nth(2).wait_for()
        page.set_viewport_size({"width": 1280, "height": 420})
        page.locator("#comparison").evaluate("(e) => scrollTo(0, e.offsetTop - 28)")
        save(page.screenshot(), folder / "page-compare.png")
        page = answered(browser, url, 2, PHONE)
        page.evaluate("scrollTo(0, 0)")
        both = [page.screenshot()]
        page.locator("#steps").evaluate("(e) => scrollTo(0, e.getBoundingClientRect().top + scrollY - 20)")
        save_pair([*both, page.screenshot()], folder / "page-phone.png")


def answered(browser: Any, url: str, example: int, options: dict[str, Any]) -> Any:
    """A page with the answer to an example's question, nothing focused."""
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.set_default_timeout(240_000)
    page.goto(url)
    page.locator("#examples button").nth(example).click()
    done(page)
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(1, 1)
    page.locator(":focus").evaluate_all("(all) => all.forEach((e) => e.blur())")
    return page


def save(png: bytes, path: Path) -> None:
    """Write with a palette of 256 colours, which is plenty here and a third of the size."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


def save_pair(shots: list[bytes], path: Path) -> None:
    """Two screens of a phone side by side."""
    left, right = (Image.open(io.BytesIO(png)).convert("RGB") for png in shots)
    gap = left.width // 12
    pair = Image.new("RGB", (left.width + gap + right.width, left.height), (247, 247, 245))
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + gap, 0))
    out = io.BytesIO()
    pair.save(out, "PNG")
    save(out.getvalue(), path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
