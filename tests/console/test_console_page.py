"""The page beside a scheduler and a gateway of this process and a worker that the test plays: every block is known."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.config import GatewaySettings
from gateway.server import Gateway
from tests.console.browser import Browser
from tests.scheduler.peers import Pool, capacity, pool

LIVE = "return document.querySelector('#connection').dataset.state === 'live'"
COLOURS = """
const map = document.querySelector('.pool canvas'), copy = new OffscreenCanvas(map.width, map.height);
const context = copy.getContext('2d', {willReadFrequently: true});
context.drawImage(map, 0, 0);
const data = context.getImageData(0, 0, map.width, map.height).data, seen = new Set();
for (let at = 0; at < data.length; at += 4) if (data[at + 3] === 255) seen.add(data.slice(at, at + 3).join());
return [...seen];
"""


class World:
    """A scheduler and a gateway on a loop of their own; `do` runs a coroutine there."""

    def __init__(self, loop: asyncio.AbstractEventLoop, made: Pool, gateway: Gateway) -> None:
        self._loop = loop
        self.made = made
        self.gateway = gateway

    @property
    def url(self) -> str:
        return f"http://{self.gateway.http_address}/console"

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def hold(self, num_requests: int, prompt: int, num_blocks: int = 400, n: int = 1) -> None:
        """Has that many requests computed up to their first tokens, and keeps them there."""

        async def work() -> None:
            worker = await self.made.worker(capacity=capacity(num_blocks=num_blocks, block_size=4))
            worker.keep_beating(0.5)
            session = await self.made.gateway()
            for number in range(num_requests):
                tokens = [11 + number] * prompt
                await session.submit(1 + 8 * number, tokens, max_tokens=60, request_id=f"held-{number}", n=n)
            while len(worker.rows) < num_requests * n:
                await worker.step()

        self.do(work())


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[Pool, Gateway]]:
    async with pool(watch_interval_ms=20, watermark=0, step_timeout_s=600, stall_s=600) as made:
        address = made.serving.addresses[0]
        configured = GatewaySettings(
            scheduler=address, listen="127.0.0.1:0", http_listen="127.0.0.1:0", stop_grace_s=0, **settings
        )
        gateway = Gateway(configured, None)
        await gateway.start()
        try:
            yield made, gateway
        finally:
            await gateway.stop()


@contextmanager
def world(page: Browser | None = None, **settings: Any) -> Iterator[World]:
    """A world for the length of a `with` block, on a thread of its own: the browser is waited for on this one. A page
    is left before the world ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), loop).result(60)

    context = serving(**settings)
    try:
        made, gateway = do(context.__aenter__())
        try:
            yield World(loop, made, gateway)
            if page is not None:
                page.leave()
        finally:
            do(context.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_the_keyboard_reaches_every_block_and_shows_one_requests_alone(page: Browser) -> None:
    with world(page) as here:
        here.hold(3, 40)
        page.open(here.url)
        page.until(LIVE)
        page.until("return document.querySelectorAll('#requests tbody tr').length === 3")
        page.focus(".pool canvas")
        assert page.until("return document.querySelector('#block').textContent").startswith("Block 0: held-")
        page.press("ArrowRight")
        assert page.text("#block").startswith("Block 1: held-")
        page.press("End")
        assert page.text("#block") == "Block 399: free"
        page.press("ArrowRight")
        assert page.text("#block") == "Block 399: free", "there is nothing behind the last block"
        page.press("ArrowLeft", holding="Control")
        shown = page.text("#block")
        assert ": held-" in shown, "the last block that somebody has"
        before = page.run(COLOURS)
        page.press("Enter")
        chosen = page.run("return document.querySelector('button[aria-pressed=true] .name').textContent")
        assert f": {chosen}, " in shown
        assert len(page.run(COLOURS)) < len(before), "the others fade"
        page.press("Escape")
        assert sorted(page.run(COLOURS)) == sorted(before)
        page.press("Tab")
        assert page.run("return document.activeElement !== document.querySelector('.pool canvas')")


def test_pointing_at_a_shared_block_says_whose_it_is_and_how_many_share_it(page: Browser) -> None:
    with world(page) as here:
        here.hold(1, 16, n=3)
        page.open(here.url)
        page.until("return / shared /.test(document.querySelector('.figures')?.textContent)")
        page.hover(".pool canvas", 3, 3)
        assert page.text("#block") == "Block 0: held-0, sequence 0, shared by 3 sequences"


def test_fifty_thousand_blocks_are_drawn_each_at_its_place(page: Browser, tmp_path: Path) -> None:
    with world(page) as here:
        here.hold(40, 400, num_blocks=50_000)
        page.resize(1440, 1000)
        page.open(here.url)
        page.until("return / of 50,000 used/.test(document.querySelector('.figures')?.textContent)")
        page.until("return document.querySelectorAll('#requests tbody tr').length === 40")
        width, height = page.run("const c = document.querySelector('.pool canvas'); return [c.width, c.height]")
        side = 3
        assert (width // side) * (height // side) >= 50_000
        assert height <= 500, "it is seen without scrolling"
        assert len(page.run(COLOURS)) > 40, "a colour per request"
        page.focus(".pool canvas")
        page.press("End")
        assert page.text("#block") == "Block 49,999: free"
        page.screenshot(tmp_path / "big.png")


def test_dark_and_light_follow_the_system_and_a_narrow_window_does_not_scroll_sideways(page: Browser) -> None:
    with world(page) as here:
        here.hold(3, 40)
        page.theme("light")
        page.open(here.url)
        page.until(LIVE)
        page.until("return document.querySelector('.pool')")
        ground = "return getComputedStyle(document.body).backgroundColor"
        assert page.run(ground) == "rgb(246, 247, 249)"
        drawn = f"(() => {{{COLOURS}}})().sort()"
        page.until(f"return {drawn}.length > 1")
        light = sorted(page.run(COLOURS))
        page.theme("dark")
        assert page.run(ground) == "rgb(17, 21, 27)"
        # The page is told of the theme after the style has changed, and draws the map anew then.
        assert page.until(f"return {drawn}.join(' ') !== {' '.join(light)!r}")
        page.resize(380, 900)
        assert page.until("return document.documentElement.scrollWidth <= 380")


def test_every_control_has_an_accessible_name(page: Browser) -> None:
    with world(page) as here:
        here.hold(2, 40)
        page.open(here.url)
        page.until("return document.querySelector('#requests tbody tr')")
        nodes = page.devtools("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "spinbutton", "application", "image", "region", "link"}
        named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
        controls = [(role, name) for role, name in named if role in roles]
        assert {role for role, _ in controls} >= {"button", "textbox", "spinbutton", "application"}
        assert [role for role, name in controls if not name.strip()] == []


def test_with_api_keys_the_page_asks_for_one_and_then_shows_everything(page: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame-open operator\n")
    with world(page, api_keys_file=keys) as here:
        here.hold(1, 16)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(here.url + "/events")
        assert caught.value.code == 401
        caught.value.close()
        page.open(here.url)
        page.until("return !document.querySelector('#key-form').hidden")
        assert "API key" in page.text("#connection")
        page.run("document.querySelector('#key').value = 'sesame-open'")
        page.click("#key-form button")
        page.until("return document.querySelector('#requests tbody tr')")
        assert page.run("return document.querySelector('#key-form').hidden")
        assert all("401" in line for line in page.log()), "what was refused before the key came is all that is logged"


def test_without_the_console_its_paths_do_not_exist() -> None:
    with world(console=False) as here, pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(here.url)
    assert caught.value.code == 404
    caught.value.close()
