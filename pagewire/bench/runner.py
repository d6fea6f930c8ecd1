"""Keeps a service up for a series of rows, each with its own time cap.

A row that fails or hangs becomes a row with an error; the service is then brought back to rest, or started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagewire.bench import metrics
from pagewire.bench.results import Row
from pagewire.bench.service import Launch, Service
from pagewire.bench.session import BenchError, Session, loads
from pagewire.bench.workloads import Job

START_LIMIT_S = 300.0
IDLE_LIMIT_S = 10.0
MAX_RESTARTS = 2
LEAST_ROW_S = 3.0
"""With less time left a row is not begun."""
WARM_LENGTHS = 64


class Runner:
    """Where rows run: a service of our own, or one that is there already."""

    def __init__(
        self,
        launch: Launch | None,
        folder: Path,
        *,
        scheduler: str = "",
        metrics_address: str | None = None,
        gateways: tuple[str, ...] = (),
        http: tuple[str, ...] = (),
        limit_s: float = 3600.0,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            launch: what to start; None: `scheduler`, `metrics_address`, `gateways` and `http` are there.
            folder: for the processes' logs.
            limit_s: seconds for everything.
            say: tells people how far it is.
        """
        self._launch = launch
        self._folder = folder
        self._service: Service | None = None
        self._given = (scheduler, metrics_address, list(gateways), list(http))
        self._deadline = time.monotonic() + limit_s
        self._starts = 0
        self.say = say
        self.start_s: float | None = None
        """Seconds that the last start took."""

    @property
    def scheduler(self) -> str:
        """The scheduler's address."""
        return self._service.scheduler if self._service else self._given[0]

    @property
    def metrics_address(self) -> str | None:
        """The Prometheus page's address, if known."""
        return self._service.metrics if self._service else self._given[1]

    @property
    def gateways(self) -> list[str]:
        """Addresses of the gateways' gRPC."""
        return self._service.gateways if self._service else self._given[2]

    @property
    def http(self) -> list[str]:
        """Addresses of the gateways' OpenAI-compatible HTTP."""
        return self._service.http if self._service else self._given[3]

    @property
    def service(self) -> Service | None:
        """The running service, if it is ours."""
        return self._service

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._deadline - time.monotonic()

    async def row(self, head: Row, limit_s: float, measure: Callable[[], Awaitable[Row]]) -> Row:
        """Measures one row: `head` and what `measure` returns, or an error in its place. Never raises BenchError."""
        if self.left_s < LEAST_ROW_S:
            return {**head, "error": "not run: the time for the whole series was used up"}
        try:
            await self._ensure()
        except BenchError as error:
            return {**head, "error": str(error)}
        limit_s = min(limit_s, self.left_s)
        try:
            async with asyncio.timeout(limit_s):
                return {**head, **await measure()}
        except TimeoutError:
            what = f"cut short after {limit_s:.0f} s"
        except (BenchError, OSError) as error:
            what = str(error)
        if failure := await self._failure():
            what = f"{what}; {failure}"
        await self._settle()
        return {**head, "error": what}

    async def stop(self) -> None:
        """Ends what was started."""
        service, self._service = self._service, None
        if service is not None:
            await asyncio.to_thread(service.stop)

    async def vocab_size(self) -> int:
        """Of the model that is served. Raises BenchError when none is."""
        await self._ensure()
        async with Session(self.scheduler, "hello") as session:
            return session.model.model.vocab_size

    async def begin_online(self) -> None:
        """Lets the scheduler plan with token budget and target of online rows from now on; the model stays loaded."""
        launch = self._launch
        if launch is None or not (launch.online_token_budget or launch.online_target_itl_ms):
            return
        target_itl_ms = launch.online_target_itl_ms or launch.target_itl_ms
        token_budget = launch.online_token_budget or launch.token_budget
        target = f", {target_itl_ms:g} ms from token to token" if target_itl_ms else ""
        self.say(f"token budget {token_budget}{target} for the online rows")
        await self.replan(
            token_budget=token_budget,
            target_itl_ms=target_itl_ms,
            online_token_budget=None,
            online_target_itl_ms=None,
        )

    async def replan(self, **settings: Any) -> None:
        """Lets the scheduler plan with other settings of the launch from now on; the model stays loaded."""
        assert self._launch is not None
        self._launch = launch = replace(self._launch, **settings)
        if self._service is None:
            return
        service, self._service = self._service, None
        try:
            await asyncio.to_thread(service.replace_scheduler, launch, min(60.0, self.left_s))
        except BenchError as error:
            self.say(str(error))  # the next row starts everything anew
            return
        self._service = service
        try:
            await self._warm_up()
        except BenchError as error:
            self.say(str(error))

    async def _ensure(self) -> None:
        """Starts the service if it is ours and does not run. Raises BenchError if that fails too often."""
        if self._launch is None or self._service is not None:
            return
        if self._starts > MAX_RESTARTS:
            raise BenchError(f"the service was started {self._starts} times and does not stay up")
        self._starts += 1
        launch = self._launch
        self.say(f"starting scheduler, {launch.workers} workers and {launch.gateways} gateways on {launch.model} ...")
        service, begun = Service(self._launch, self._folder), time.monotonic()
        await asyncio.to_thread(service.start, max(1.0, min(START_LIMIT_S, self.left_s)))
        self.start_s = round(time.monotonic() - begun, 2)
        self._service = service
        self.say(f"ready after {self.start_s:.1f} s; logs in {self._folder}")
        await self._warm_up()

    async def _warm_up(self) -> None:
        """Runs every batch size and long prompts once: what is compiled or captured at first use is not measured."""
        assert self._launch is not None
        begun = time.monotonic()
        batch = self._launch.max_num_seqs
        longest = self._launch.max_model_len or 1024
        prompts = [[11 + (number + place) % 50 for place in range(8)] for number in range(batch)]
        jobs = [Job(prompt, 2 + number % WARM_LENGTHS) for number, prompt in enumerate(prompts)]
        jobs += [Job([12] * (longest - 2), 2), Job([13] * max(1, longest // 4), 2)]
        try:
            async with asyncio.timeout(max(1.0, self.left_s)), Session(self.scheduler, "warm-up") as session:
                await session.drain_while(session.submit(session.prepare(jobs)))
        except (BenchError, TimeoutError) as error:
            failure = await self._failure()
            await self.stop()
            raise BenchError(f"the warm-up failed: {error or 'out of time'}; {failure}") from None
        self.say(f"warm-up took {time.monotonic() - begun:.1f} s")

    async def _failure(self) -> str:
        """Which process has died. One that closed its streams a moment ago may not be gone yet."""
        for _ in range(20):
            if self._service is None or (failure := self._service.failure()):
                return failure if self._service else ""
            await asyncio.sleep(0.05)
        return ""

    async def _settle(self) -> None:
        """After a row that failed: waits until nothing runs any more, or gives the service up."""
        if self._service is None:
            return
        deadline = time.monotonic() + min(IDLE_LIMIT_S, max(0.0, self.left_s))
        with contextlib.suppress(BenchError):
            while not self._service.failure() and time.monotonic() < deadline:
                now = await loads(self.scheduler)
                if now.loads and not any(load.running + load.waiting + load.swapped for load in now.loads):
                    return
                await asyncio.sleep(0.1)
        if self.left_s >= LEAST_ROW_S:
            self.say("the service does not come to rest: it is started again")
        await self.stop()

    async def read_metrics(self) -> metrics.Page | None:
        """The scheduler's page; None where there is none."""
        return await metrics.read(self.metrics_address) if self.metrics_address else None
