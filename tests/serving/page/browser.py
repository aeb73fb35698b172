"""A real server in a process of its own, and headless Chromium in front of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qzoom.serving

EXAMPLES = Path(qzoom.serving.__file__).parent / "page" / "examples"
RECEIPT = EXAMPLES / "receipt.jpg"
DATE = "What is the date?"
DESKTOP = {"width": 1280, "height": 900}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The first Chromium that is installed."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """The address of `qzoom serve` on a free port; the process ends with the block."""
    command = [sys.executable, "-m", "qzoom", "serve", "--port", "0", "--log-level", "warning", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    late = threading.Timer(300, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        late.cancel()
        assert line.startswith("qzoom serves http://"), f"the server printed {line!r}"
        yield line.split()[-1]
    finally:
        late.cancel()
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of the `playwright` package."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def call(url: str, path: str, body: dict[str, Any], key: str = "") -> tuple[int, dict[str, Any]]:
    """What the server itself says to a JSON body: status and JSON."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=300) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class HeldRequests:
    """A page's requests for an address, which wait until they are let go."""

    def __init__(self, page: Any, address: str) -> None:
        self._page, self._held = page, []
        page.route(address, lambda route: self._held.append(route))

    def next(self) -> Any:
        """The oldest that waits, as Playwright's route; waits for one."""
        deadline = time.monotonic() + 240
        while not self._held:  # a route has no event to wait for
            assert time.monotonic() < deadline, "the page did not ask"
            self._page.wait_for_timeout(10)
        return self._held.pop(0)


def body_of(path, question, **controls):
    data = base64.b64encode(path.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "qzoom": {"heatmap": True, **controls}}


def truth(url, path, question, **controls):
    status, answer = call(url, "/v1/chat/completions", body_of(path, question, **controls))
    assert status == 200, answer
    return answer["choices"][0]["message"], answer["usage"]


def done(page):
    """Wait until the answer on the screen is complete."""
    page.locator("#result[data-answered]").wait_for()


def ask(page, question):
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    done(page)


def upload(page, path=RECEIPT):
    page.locator("#file").set_input_files(path)
    page.locator("#question").wait_for()


def numbers(text):
    return [int(word.replace(",", "")) for word in re.findall(r"\d[\d,]*", text)]
