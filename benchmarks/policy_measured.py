"""What the scheduler's policies do with a real worker: `python -m benchmarks.policy_measured OUT_FOLDER`.

    tenants         a light tenant's first tokens: alone, beside one that sends 20 times as much, in one queue with it
    conversations   turns that come back when the pool has given up their blocks, with and without the host tier
    one_off         requests that never come back, in a full pool, with and without the host tier: what it costs them
    groups          as many rows as greedy requests, as samples of one prompt, and as beams
    parking         how long Park takes, and the first token after Continue beside that of computing everything again

`benchmarks.policy` has such loads on a virtual clock. Everything is random weights of a config, whose answers do not
matter, and has fixed seeds; arrivals are open loops, conversations wait for their answers.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.arguments import add_model
from pagewire.aio import AsyncClient
from pagewire.bench import metrics, results, serve, suite, workloads
from pagewire.bench.results import Recorder, Row
from pagewire.bench.runner import Runner
from pagewire.bench.serve import DEFAULT_LIMITS, LEAD_S, Load
from pagewire.bench.service import Launch
from pagewire.bench.session import Session, Times, loads
from pagewire.bench.workloads import HIGHEST_ID, LOWEST_ID, Job, Scale
from pagewire.requests import Options
from pagewire.types import Piece

HEAVY = 20
"""Requests of the heavy tenant for one of the light one."""
LONG_ANSWER = 1024
"""Tokens: a request is parked long before its end."""
ROW_LIMIT_S = 200.0


@dataclass(frozen=True)
class Size:
    """How much of everything; the defaults are for one large GPU."""

    length_scale: float = 1.0
    light_rate: float = 1.2
    light_requests: int = 150
    conversations: int = 80
    turns: int = 8
    turn_rate: float = 8.0
    """Turns per second of all conversations."""
    one_off_requests: int = 300
    rows: int = 72
    group: int = 4
    """Samples, or beams, of one request."""
    answer: int = 256
    """Tokens of an answer of a group."""
    look_s: float = 0.05
    """Between looks at how many blocks are held."""
    parked: tuple[int, ...] = (1024, 4096, 8192)
    """Tokens of a request that is parked."""
    repeat: int = 5
    """Requests parked of each length."""

    def length(self, tokens: int) -> int:
        """Scaled, at least 8."""
        return max(8, round(self.length_scale * tokens))


SMALL = Size(
    length_scale=0.04,
    light_rate=2.0,
    light_requests=6,
    conversations=4,
    turns=3,
    turn_rate=20.0,
    one_off_requests=12,
    rows=12,
    answer=1500,
    look_s=0.002,
    parked=(1024,),
    repeat=1,
)
"""For a machine without a GPU: it shows that everything runs."""


@dataclass(frozen=True)
class Bench:
    """A running service and what is measured at it."""

    runner: Runner
    size: Size
    vocab: int

    def prompt(self, generator: np.random.Generator, tokens: int) -> list[int]:
        """Random tokens."""
        drawn: list[int] = generator.integers(LOWEST_ID, min(HIGHEST_ID, self.vocab), tokens).tolist()
        return drawn

    def new_tenant(self) -> str:
        """A name that nobody has had, so that nothing of it is cached."""
        return f"tenant-{uuid.uuid4()}"


def milliseconds(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Percentiles."""
    return results.percentiles([value / 1e6 for value in nanoseconds], 2)


# A light tenant beside a heavy one.


async def tenants(bench: Bench, rate: float, how: str) -> Row:
    """One load of two tenants, or of the light one alone."""
    size = bench.size
    scale = Scale(1.0, size.length_scale)
    light, arrivals = workloads.online(rate, size.light_requests, scale, bench.vocab)
    # The other's prompts begin alike: told backwards they do not, and one queue finds nothing in the prefix cache.
    light = [Job(job.prompt[::-1], job.max_tokens) for job in light]
    heavy, heavy_arrivals = workloads.online(HEAVY * rate, HEAVY * size.light_requests, scale, bench.vocab)
    together = sorted(
        [
            *((at, job, "light") for at, job in zip(arrivals, light, strict=True)),
            *((at, job, "heavy") for at, job in zip(heavy_arrivals, heavy, strict=True) if how != "alone"),
        ],
        key=itemgetter(0),
    )
    async with Session(bench.runner.scheduler, bench.new_tenant()) as session:
        messages = []
        for _, job, tenant in together:
            messages += session.prepare([job], "" if how == "one queue" else tenant)
        begin = time.monotonic_ns() + int(LEAD_S * 1e9)
        times = await session.drain_while(session.submit_at(messages, [at for at, _, _ in together], begin), timed=True)
    first: dict[str, list[int]] = {"light": [], "heavy": []}
    for one, (_, _, tenant) in zip(times, together, strict=True):
        first[tenant].append(one.arrivals[0] - one.due)
    row: Row = {f"{tenant}_ttft_ms": milliseconds(values) for tenant, values in first.items() if values}
    row["itl_ms"] = milliseconds(serve.gaps(times))
    seconds = (max(one.arrivals[-1] for one in times) - begin) / 1e9
    return {**row, "seconds": round(seconds, 2), "out_tok_s": round(sum(one.tokens for one in times) / seconds, 1)}


# Conversations.


async def answer(stream: AsyncGenerator[Piece], times: Times) -> tuple[list[int], int]:
    """Reads a stream of one sequence to its end: its tokens, and how many prompt tokens the prefix cache had."""
    tokens: list[int] = []
    cached = 0
    async for piece in stream:
        if piece.token_ids:
            times.arrivals.append(time.monotonic_ns())
            tokens += piece.token_ids
        if piece.finish is not None:
            cached = piece.finish.usage.cached_tokens
    times.tokens = len(tokens)
    return tokens, cached


async def conversations(bench: Bench) -> Row:
    """Conversations of some turns; each waits for its answer, then 0.5 to 1.5 times the mean. A prompt is all
    that was said before, and a question of 100 tokens; the first begins with 800 tokens of its own."""
    size, tenant = bench.size, bench.new_tenant()
    gap = size.conversations / size.turn_rate
    times: list[Times] = []
    prompt_tokens = cached_tokens = 0

    async def talk(client: AsyncClient, number: int) -> None:
        nonlocal prompt_tokens, cached_tokens
        generator = np.random.default_rng((11, number))
        said = bench.prompt(generator, size.length(800))
        for _ in range(size.turns):
            await asyncio.sleep(gap * generator.uniform(0.5, 1.5))
            said += bench.prompt(generator, size.length(100))
            note = Times(due=time.monotonic_ns())
            stream = client.generate(
                said,
                max_tokens=size.length(int(generator.integers(50, 250))),
                temperature=0.0,
                ignore_eos=True,
                token_ids_only=True,
                tenant=tenant,
            )
            tokens, cached = await answer(stream, note)
            times.append(note)
            prompt_tokens += len(said)
            cached_tokens += cached
            said = said + tokens

    begin = time.monotonic_ns()
    async with AsyncClient(bench.runner.gateways[0]) as client, asyncio.TaskGroup() as group:
        for number in range(size.conversations):
            group.create_task(talk(client, number))
    seconds = (time.monotonic_ns() - begin) / 1e9
    return {
        "ttft_ms": milliseconds([one.arrivals[0] - one.due for one in times]),
        "itl_ms": milliseconds(serve.gaps(times)),
        "turns": len(times),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "seconds": round(seconds, 2),
        "out_tok_s": round(sum(one.tokens for one in times) / seconds, 1),
    }


async def one_off(bench: Bench) -> Row:
    """ShareGPT-like requests at 30/s, none like another. Others' blocks fill the pool before."""
    async with AsyncClient(bench.runner.gateways[0]) as client:
        await fill(bench, client)
    return await serve.measure(
        bench.runner,
        "session",
        Load(rate=30.0),
        bench.size.one_off_requests,
        scale=Scale(1.0, bench.size.length_scale),
        limits=DEFAULT_LIMITS,
        vocab_size=bench.vocab,
    )


# Rows that belong together.

LOADS: tuple[tuple[str, ...], ...] = (("greedy",), ("samples",), ("beams",), ("greedy", "samples", "beams"))


async def groups(bench: Bench, kinds: Sequence[str]) -> Row:
    """All rows at once, each kind its share: prompts of 512 tokens, answers of 256. The load runs twice and the second
    time counts: its prompts are found in the prefix cache, so that it decodes and little else."""
    size, tenant = bench.size, bench.new_tenant()
    tokens = size.length(size.answer)
    width = {"greedy": 1, "samples": size.group, "beams": size.group}
    counts = {kind: size.rows // len(kinds) // width[kind] for kind in kinds}
    every: Options = {"max_tokens": tokens, "ignore_eos": True, "token_ids_only": True, "tenant": tenant}
    options: dict[str, Options] = {
        "greedy": {**every, "temperature": 0.0},
        "samples": {**every, "temperature": 1.0, "seed": 1, "n": size.group},
        "beams": {**every, "temperature": 0.0, "beam_width": size.group, "n": 1},
    }

    async def one_request(client: AsyncClient, kind: str, prompt: list[int]) -> None:
        async for _ in client.generate(prompt, **options[kind]):
            pass

    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            carried = await loads(bench.runner.scheduler)
            most = max(most, sum(load.total_blocks - load.free_blocks for load in carried.loads))
            await asyncio.sleep(size.look_s)

    seconds = 0.0
    async with AsyncClient(bench.runner.gateways[0]) as client:
        for _ in range(2):
            generator = np.random.default_rng(12)
            watching, most = asyncio.create_task(watch()), 0
            begin = time.monotonic_ns()
            try:
                async with asyncio.TaskGroup() as tasks:
                    for kind, count in counts.items():
                        for _ in range(count):
                            tasks.create_task(one_request(client, kind, bench.prompt(generator, size.length(512))))
                seconds = (time.monotonic_ns() - begin) / 1e9
            finally:
                watching.cancel()
    rows = sum(counts[kind] * width[kind] for kind in kinds)
    return {
        "requests": counts,
        "rows": rows,
        "tokens_each": tokens,
        "seconds": round(seconds, 3),
        "ms_per_token": round(seconds * 1e3 / tokens, 3),
        "row_tok_s": round(rows * tokens / seconds, 1),
        "most_blocks": most,
    }


# Park and Continue.


async def parking(bench: Bench, tokens: int) -> Row:
    """Requests of `tokens` tokens, one after another: parked while they decode; others' requests go through the whole
    pool; continued. Beside it the same number of tokens as a new request. Medians."""
    parked: list[int] = []
    continued: list[int] = []
    computed: list[int] = []
    generator = np.random.default_rng((13, tokens))
    every: Options = {"temperature": 0.0, "ignore_eos": True, "token_ids_only": True}
    async with AsyncClient(bench.runner.gateways[0]) as client:
        for _ in range(bench.size.repeat):
            name = bench.new_tenant()
            lives: Options = {**every, "request_id": name, "tenant": name, "max_tokens": LONG_ANSWER}
            stream = client.generate(bench.prompt(generator, tokens), **lives)
            async for piece in stream:
                if piece.first_token >= 2:
                    begin = time.monotonic_ns()
                    await client.park(name)
                    parked.append(time.monotonic_ns() - begin)
                    break
            async for _ in stream:
                pass
            await fill(bench, client)
            short: Options = {**every, "max_tokens": 4}
            for stream, times in (
                (client.continue_request(name, max_tokens=4), continued),
                (client.generate(bench.prompt(generator, tokens), **short), computed),
            ):
                note = Times(due=time.monotonic_ns())
                await answer(stream, note)
                times.append(note.arrivals[0] - note.due)
    return {
        name: milliseconds(times)["p50"]
        for name, times in (("park_ms", parked), ("continue_ms", continued), ("new_request_ms", computed))
    }


async def fill(bench: Bench, client: AsyncClient) -> None:
    """Others' requests go through every block of the pool."""
    carried = (await loads(bench.runner.scheduler)).loads[0]
    model = (await client.models())[0]
    length = model.max_model_len - 2
    count = -(-carried.total_blocks * model.block_size // length)
    generator = np.random.default_rng(14)

    async def one() -> None:
        stream = client.generate(
            bench.prompt(generator, length), max_tokens=1, temperature=0.0, ignore_eos=True, tenant=bench.new_tenant()
        )
        async for _ in stream:
            pass

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


# What is measured, and where.


async def all_tenants(bench: Bench, recorder: Recorder) -> None:
    """Alone, beside the other, and as one; each time by a scheduler that has seen no tenants before, because it expects
    a light one back for a minute."""
    for how in ("alone", "beside", "one queue"):
        await bench.runner.replan()
        rate = bench.size.light_rate
        head = {"light_per_s": rate, "heavy_per_s": HEAVY * rate, "how": how}
        await record(bench, recorder, head, partial(tenants, bench, rate, how))


async def with_and_without_tier(
    bench: Bench, recorder: Recorder, load: Callable[[Bench], Awaitable[Row]], turns: int = 1
) -> None:
    """A load in turns without and with the host tier, each time with a new scheduler."""
    for on in (False, True) * turns:
        await bench.runner.replan(host_prefix_cache=on)
        await record(bench, recorder, {"host_prefix_cache": on}, partial(load, bench))
    await bench.runner.replan(host_prefix_cache=None)


async def all_conversations(bench: Bench, recorder: Recorder) -> None:
    """Once each."""
    await with_and_without_tier(bench, recorder, conversations)


async def all_one_off(bench: Bench, recorder: Recorder) -> None:
    """Three turns: what it costs is about as much as chance."""
    await with_and_without_tier(bench, recorder, one_off, turns=3)


async def all_groups(bench: Bench, recorder: Recorder) -> None:
    """Every kind by itself, and all of them."""
    for kinds in LOADS:
        await record(bench, recorder, {"kinds": kinds}, partial(groups, bench, kinds))


async def all_parking(bench: Bench, recorder: Recorder) -> None:
    """Every length."""
    for context in bench.size.parked:
        tokens = bench.size.length(context)
        await record(bench, recorder, {"tokens": tokens}, partial(parking, bench, tokens))


EXPERIMENTS = {
    "tenants": all_tenants,
    "conversations": all_conversations,
    "one_off": all_one_off,
    "groups": all_groups,
    "parking": all_parking,
}
ON_ALL_MEMORY = {"tenants"}
"""Their pool is what the worker finds; who waits there, waits for its turn. The others' is to be overfilled."""


async def record(bench: Bench, recorder: Recorder, head: Row, measure: Callable[[], Awaitable[Row]]) -> None:
    """Measures one row, and what the scheduler counted meanwhile."""
    runner = bench.runner
    before = await runner.read_metrics()
    row = await runner.row(head, ROW_LIMIT_S, measure)
    after = await runner.read_metrics()
    if "error" not in row and before is not None and after is not None:
        used = metrics.used(before, after)
        row["scheduler"] = {
            "steps": used.steps,
            "forward_ms": used.part_ms["forward"],
            "idle_s": round(used.idle_s, 3),
            "preemptions": used.preemptions,
            "found_tokens": used.found_tokens,
            "learned_ms": {
                f"{name.removeprefix('pagewire_').removesuffix('_seconds')} {labels}": round(value * 1e3, 3)
                for (name, labels), value in after.items()
                if name in ("pagewire_plan_lead_seconds", "pagewire_gathering_wait_seconds")
            },
        }
    recorder.add(row)
    print(row, flush=True)


async def measure(given: argparse.Namespace, folder: Path) -> bool:
    """All rows; whether each has values."""
    launch = Launch(
        model=given.model,
        load_format=given.load_format,
        device=given.device,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        token_budget=2048,
        gateways=1,
    )
    small = replace(launch, num_blocks=given.num_blocks, host_blocks=given.host_blocks)
    rows: list[Row] = []
    for sized in (launch, small):
        names = [name for name in given.experiment if (name in ON_ALL_MEMORY) == (sized is launch)]
        if not names:
            continue
        runner = Runner(sized, folder / names[0], limit_s=given.limit_s, say=print)
        try:
            bench = Bench(runner, SMALL if given.small else Size(), await runner.vocab_size())
            for name in names:
                recorder = Recorder(given.out / f"{name}.json", suite.header(sized, None))
                await EXPERIMENTS[name](bench, recorder)
                rows += recorder.rows
        finally:
            await runner.stop()
    return not any("error" in row for row in rows)


def main() -> int:
    """Command line. Exit code 1: a row has no value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    add_model(parser)
    parser.add_argument("--experiment", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--num-blocks", type=int, default=4096, help="of a pool to be overfilled, 16 tokens each")
    parser.add_argument("--host-blocks", type=int, default=16_384, help="of the host arena beside it")
    parser.add_argument("--max-model-len", type=int, default=12_288)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="little of everything, for a machine without a GPU")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for one service")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if uvloop.run(measure(given, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
