"""The console of the whole service, `pagewire up` with the bundled model, in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from tests.console.browser import Browser, why_no_browser
from tests.service import service


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[service.Service]:
    if reason := why_no_browser():
        pytest.skip(reason)
    running = service.start(tmp_path_factory.mktemp("console"), "--num-blocks", "300", "--host-blocks", "64")
    yield running
    assert service.stop(running) == 0


def complete(up: service.Service, name: str, **fields: object) -> threading.Thread:
    """Starts a completion of its own, whose answer nobody reads, under a name."""
    content = {"model": "", "prompt": "A dictionary maps keys to values.", "ignore_eos": True, **fields}
    request = urllib.request.Request(
        f"http://{up.ready['http']}/v1/completions",
        json.dumps({key: value for key, value in content.items() if value != ""}).encode(),
        {"content-type": "application/json", "x-request-id": name},
    )

    def run() -> None:
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_address_is_printed_and_the_root_leads_to_it(up: service.Service, page: Browser) -> None:
    assert f"console on http://{up.ready['http']}/console" in up.log.read_text()
    page.open(f"http://{up.ready['http']}/")
    assert page.run("return location.pathname") == "/console"


def test_a_running_requests_blocks_are_on_the_page_and_its_row_too(up: service.Service, page: Browser) -> None:
    page.open(f"http://{up.ready['http']}/console")
    page.until("return document.querySelector('#connection').dataset.state === 'live'")
    thread = complete(up, "mine", max_tokens=900)
    name = page.until("return document.querySelector('#requests .name')?.textContent")
    assert name.startswith("mine")
    page.until("return [...document.querySelectorAll('#requests td.state')].some((e) => e.textContent === 'running')")
    page.until("return /^[1-9][0-9]* of 300 used/.test(document.querySelector('.figures').textContent)")
    page.focus(".pool canvas")
    page.press("Home")
    assert page.until("return document.querySelector('#block').textContent").startswith(f"Block 0: {name}, sequence 0")
    thread.join()
    page.until("return !document.querySelector('#requests tbody tr')")
    page.until("return /^0 of 300 used .* cached/.test(document.querySelector('.figures').textContent)")


def test_the_prompt_box_streams_tokens(up: service.Service, page: Browser) -> None:
    page.open(f"http://{up.ready['http']}/console")
    page.until("return document.querySelector('#connection').dataset.state === 'live'")
    page.run("document.querySelector('#max-tokens').value = 60; document.querySelector('#temperature').value = 0")
    page.run(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelector('#answer').textContent))"
        ".observe(document.querySelector('#answer'), {childList: true})"
    )
    page.focus("#text")
    page.press("Enter", holding="Control")
    note = page.until(
        "const t = document.querySelector('#answer-note').textContent; return t.includes('first after') && t"
    )
    assert re.match(r"4 prompt tokens, \d+ tokens, the first after \d+ ms", note)
    seen = page.run("return seen")
    assert len(seen) > 5, "the answer came in pieces"
    assert page.text("#answer") == seen[-1] != ""


def test_a_restarted_scheduler_and_gateway_are_waited_for_by_the_page(up: service.Service, page: Browser) -> None:
    page.open(f"http://{up.ready['http']}/console")
    page.until("return document.querySelector('#connection').dataset.state === 'live'")
    for pid, words in ((up.ready["pids"]["scheduler"], "scheduler"), (up.ready["pids"]["gateways"][0], "gateway")):
        page.run(
            "window.said = []; window.watching = new MutationObserver(() => said.push(document.querySelector("
            "'#connection').textContent)); watching.observe(document.querySelector('#connection'), {childList: true})"
        )
        os.kill(pid, signal.SIGKILL)
        page.until("return said.some((text) => text.includes(arguments[0]))", words)
        page.until("return said.at(-1) === 'Live' && document.querySelector('.pool')")
        page.run("watching.disconnect()")
    assert all("console/events" in line or "v1/models" in line for line in page.log()), "nothing but lost connections"
