"""One browser for all tests of the console."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.console.browser import Browser, browser, why_no_browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; skips where there is none."""
    if reason := why_no_browser():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("chromium")) as window:
        yield window


@pytest.fixture
def page(chromium: Browser) -> Iterator[Browser]:
    """The browser with an empty log, light, 1280 pixels wide; afterwards nothing may have gone wrong in the page."""
    chromium.open("about:blank")
    chromium.resize(1280, 900)
    chromium.theme("light")
    chromium.log()
    yield chromium
    chromium.leave()
