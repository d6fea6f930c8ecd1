"""Our own client against the real service: a gateway dies in mid-stream and the stream goes on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire.aio import AsyncClient
from pagewire.client import Client
from tests.service import service

TOKENS = 60


@pytest.mark.slow
async def test_streams_of_both_clients_survive_a_killed_gateway_token_for_token(tmp_path: Path) -> None:
    async with service.running(tmp_path) as up:
        options = {"max_tokens": TOKENS, "temperature": 0.8, "ignore_eos": True}

        def sync_tokens(*, kill: bool) -> list[int]:
            tokens: list[int] = []
            with Client(up.address) as client:
                for piece in client.generate("The function returns", seed=5, **options):
                    if kill and not tokens:
                        os.kill(up.ready["pids"]["gateways"][0], signal.SIGKILL)
                    tokens.extend(piece.token_ids)
            return tokens

        async def async_tokens(seed: int) -> list[int]:
            async with AsyncClient(up.address) as client:
                pieces = client.generate("The function returns", seed=seed, **options)
                return [token async for piece in pieces for token in piece.token_ids]

        expected = [await asyncio.to_thread(sync_tokens, kill=False), *[await async_tokens(seed) for seed in range(3)]]
        assert [len(tokens) for tokens in expected] == [TOKENS] * 4
        others = [asyncio.create_task(async_tokens(seed)) for seed in range(3)]
        disturbed = await asyncio.to_thread(sync_tokens, kill=True)
        assert [disturbed, *await asyncio.gather(*others)] == expected


@pytest.mark.slow
def test_the_demo_works() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pagewire.demo", "--max-tokens", "20"],
        capture_output=True,
        text=True,
        cwd=service.ROOT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ prompt \+ \d+ generated", result.stdout)
    assert "All processes have ended." in result.stdout
