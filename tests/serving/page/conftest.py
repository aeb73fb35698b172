"""A real server, a real browser, and pages that must not make noise or ask anyone else."""

import pytest

from tests.serving.page.browser import DESKTOP, chromium, find_browser
from tests.serving.running import running


@pytest.fixture(scope="session", autouse=True)
def _needs_a_browser():
    if find_browser() is None:
        pytest.skip("no Chromium is installed")
    pytest.importorskip("playwright", reason="the Python package playwright is not installed")


@pytest.fixture(scope="session")
def url(model):
    with running(model) as site:
        yield site.url


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def open_page(browser, url):
    """Opens the page in a context of its own; the test fails on console errors and on requests to anywhere else."""
    contexts, trouble = [], []

    def visit(address=url, expect=(), **options):
        def heard(message):
            if message.type in ("error", "warning") and not any(word in message.text for word in expect):
                trouble.append(message.text)

        def asked(request):
            if not request.url.startswith((f"{address}/", "data:", f"blob:{address}/")):
                trouble.append(f"a request to {request.url}")

        context = browser.new_context(**({"viewport": DESKTOP, "reduced_motion": "reduce"} | options))
        contexts.append(context)
        context.set_default_timeout(240_000)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", asked)
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []
