"""The real service as its own process, and a browser that notes console errors and requests to other hosts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from serving.child import child_service

ROOT = Path(__file__).resolve().parents[2]
BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The address of `nearfar serve` with its defaults: no key, no setting of the tester's machine."""
    with child_service() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen. Per module: Playwright keeps an event loop running that other tests must not meet."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=BROWSER_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, service: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh context with the given options. Afterwards: no console error, no request elsewhere."""
    problems: list[str] = []
    hosts: set[str] = set()
    with ExitStack() as closing:

        def open_page(**options: Any) -> Any:
            context = browser.new_context(**options)
            closing.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
            page.goto(service)
            page.locator("#targets input").first.wait_for()
            page.locator(".sample img").first.wait_for()
            return page

        yield open_page
    assert problems == []
    assert hosts <= {urlsplit(service).netloc, ""}, (
        "the page asked another host"
    )  # "" is the preview's own blob: address
