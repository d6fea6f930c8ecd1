"""`pagewire health`, as a container's health check runs it."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from pagewire.runtime.metrics_page import MetricsPage, own_registry
from tests.pagewire.test_cli import pagewire
from tests.scheduler.peers import pool


async def health(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(pagewire, "health", *arguments)


async def test_a_server_is_healthy_and_a_service_that_has_no_worker_is_not() -> None:
    async with pool() as made:
        address = made.serving.addresses[0]
        done = await health(address)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        done = await health(address, "--service", "pagewire.v1.SchedulerService")
        assert done.returncode == 1
        assert done.stderr == f"pagewire health: {address} is not serving: NOT_SERVING\n"


async def test_nobody_there_is_one_line() -> None:
    done = await health("127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "pagewire health: 127.0.0.1:1 is not serving: UNAVAILABLE\n")
    done = await health("http://127.0.0.1:1/health")
    assert done.returncode == 1
    assert done.stderr == "pagewire health: http://127.0.0.1:1/health is not serving: Connection refused\n"


@pytest.mark.parametrize(("healthy", "code"), [(True, 0), (False, 1)])
async def test_a_page_tells_what_its_role_says(healthy: bool, code: int) -> None:
    page = MetricsPage(own_registry(), healthy=lambda: healthy)
    address = await page.start("127.0.0.1", 0)
    done = await health(f"http://{address}/health")
    await page.stop()
    assert done.returncode == code
    assert ("503" in done.stderr) is not healthy
