"""A real browser for tests of pages, where one is installed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 800}


@contextmanager
def launched() -> Iterator[Any]:
    """The system's Chromium under playwright.

    Skips the test where one of them is missing; with PHI3_JAX_REQUIRE_BROWSER=1 that is a failure.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        _missing(f"no browser found under the names {', '.join(NAMES)}")
    # Chromium refuses its sandbox to root.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


def _missing(what: str) -> None:
    if os.environ.get("PHI3_JAX_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{what}, and PHI3_JAX_REQUIRE_BROWSER is 1")
    pytest.skip(f"{what}; install chromium and playwright to check pages in a browser")


@dataclass
class Opened:
    """A page, what it asked for, and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Any, path: Path, size: dict[str, int], scheme: str = "light") -> Iterator[Opened]:
    """The file in a window of its own, without a network."""
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    seen = Opened(context.new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("requestfailed", lambda request: seen.complaints.append(f"failed: {request.url}"))
    seen.page.on("pageerror", lambda error: seen.complaints.append(f"error: {error}"))
    seen.page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    seen.page.goto(path.as_uri())
    yield seen
    context.close()
