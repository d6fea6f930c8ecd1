"""`pagewire bench`: load and rates, as a table and as JSON."""

from __future__ import annotations

import re
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pagewire.bundled import BUNDLED_MODEL
from pagewire.commands.extras import imports
from pagewire.runtime.errors import StartError

if TYPE_CHECKING:
    from pagewire.bench import workloads
    from pagewire.bench.serve import Limits

GOODPUT = re.compile(r"(ttft|itl|e2e):(\d+(?:\.\d+)?)(ms|s)")
MODEL_HELP = "Directory or hub id. With --load-format dummy its config.json is enough."

Model = Annotated[str, typer.Option(help=MODEL_HELP)]
LoadFormat = Annotated[str, typer.Option(help="auto reads the weights; dummy makes random ones.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MaxModelLen = Annotated[int | None, typer.Option(min=2, help="Context. Default: what the workloads need.")]
BlockSize = Annotated[int, typer.Option(min=1, max=256, help="Tokens per KV block.")]
NumBlocks = Annotated[int, typer.Option(min=0, help="Blocks of the KV pool. 0: from free memory.")]
HostBlocks = Annotated[int | None, typer.Option(min=0, help="Blocks of the swap arena. Default: the worker's own.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Sequences that run at once.")]
TokenBudget = Annotated[int, typer.Option(min=1, help="Tokens that one step computes at most.")]
Workers = Annotated[int, typer.Option(min=1, max=64, help="Workers to start, each with the whole model.")]
Scale = Annotated[float, typer.Option(help="Share of the requests, for a smoke run. Decode rows keep their batch.")]
LengthScale = Annotated[float, typer.Option(help="Share of all lengths, for a smoke run.")]
Output = Annotated[Path | None, typer.Option(help="JSON file, written after every row.")]
Logs = Annotated[Path | None, typer.Option(help="Folder for the processes' logs. Default: a temporary one.")]
Connect = Annotated[str, typer.Option(help="Scheduler that is there already, instead of starting one.")]
MetricsAddress = Annotated[str, typer.Option(help="HOST:PORT of that scheduler's metrics page.")]
RowLimit = Annotated[float, typer.Option(min=1.0, help="Seconds that one row may take.")]
Limit = Annotated[float, typer.Option(min=1.0, help="Seconds that everything may take.")]


def command() -> typer.Typer:
    """The command with its three parts."""
    application = typer.Typer(
        help="Measure throughput, latency under load, and kernels.",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True,
    )
    application.command("throughput")(throughput)
    application.command("serve")(serve)
    application.command("kernels", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(kernels)
    return application


def throughput(
    workload: Annotated[list[str] | None, typer.Option(help="Name of a row; repeatable. Default: all.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs per row; the median is told, and the spread.")] = 1,
    model: Model = str(BUNDLED_MODEL),
    load_format: LoadFormat = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = 16,
    num_blocks: NumBlocks = 0,
    host_blocks: HostBlocks = None,
    max_num_seqs: MaxNumSeqs = 512,
    token_budget: TokenBudget = 8192,
    workers: Workers = 1,
    scale: Scale = 1.0,
    length_scale: LengthScale = 1.0,
    output: Output = None,
    logs: Logs = None,
    connect: Connect = "",
    metrics: MetricsAddress = "",
    row_limit_s: RowLimit = 120.0,
    limit_s: Limit = 3600.0,
) -> None:
    """Offline rows: each set of requests at once, at the scheduler's session, with real processes and gRPC between."""
    with imports("worker"):
        from pagewire.bench import suite
        from pagewire.bench.service import Launch
        from pagewire.bench.workloads import OFFLINE
    names = workload or list(OFFLINE)
    unknown = [name for name in names if name not in OFFLINE]
    if unknown:
        raise StartError(f"there is no workload {unknown[0]!r}: the names are {', '.join(OFFLINE)}")
    launch = Launch(
        model=model,
        load_format=load_format,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        host_blocks=host_blocks,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        workers=workers,
    )
    plan = suite.Plan(
        offline=tuple(names),
        repeat=repeat,
        scale=_scale(scale, length_scale),
        row_limit_s=row_limit_s,
        limit_s=limit_s,
        offline_output=output,
        logs=logs,
    )
    _run(suite.main(plan, launch, suite.Given(connect, metrics) if connect else None))


def serve(
    rate: Annotated[list[float] | None, typer.Option(min=0.001, help="Arrivals per second; repeatable.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=4096, help="Requests that run at any time, instead; repeatable.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per rate or concurrency.")] = 200,
    door: Annotated[
        list[str] | None,
        typer.Option(help="grpc, openai, or session (the scheduler's own, without a gateway); repeatable."),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="What a good request keeps: ttft:200ms, itl:50ms (its mean), e2e:5s; repeatable."),
    ] = None,
    model: Model = str(BUNDLED_MODEL),
    load_format: LoadFormat = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = 16,
    num_blocks: NumBlocks = 0,
    host_blocks: HostBlocks = None,
    max_num_seqs: MaxNumSeqs = 512,
    token_budget: TokenBudget = 2048,
    target_itl_ms: Annotated[
        float, typer.Option(min=0.0, help="Time between tokens that prefill should not exceed. 0: no limit.")
    ] = 0.0,
    workers: Workers = 1,
    gateways: Annotated[int, typer.Option(min=1, max=64, help="Gateways to start.")] = 1,
    scale: Scale = 1.0,
    length_scale: LengthScale = 1.0,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the rows, such as rows.svg. Needs matplotlib.")] = None,
    logs: Logs = None,
    connect: Connect = "",
    gateway: Annotated[
        list[str] | None, typer.Option(help="With --connect: HOST:PORT of a gateway's gRPC; repeatable.")
    ] = None,
    http: Annotated[list[str] | None, typer.Option(help="With --connect: HOST:PORT of its HTTP; repeatable.")] = None,
    row_limit_s: RowLimit = 300.0,
    limit_s: Limit = 3600.0,
) -> None:
    """Online rows: conversations that arrive at random or run side by side; time to first token, time between tokens,
    goodput."""
    with imports("worker"):
        from pagewire.bench import suite
        from pagewire.bench.service import Launch
    with imports("bench"):
        if plot is not None:
            import matplotlib  # noqa: F401  # asked for before minutes of measuring
    places = [_place(one) for one in door or ["grpc"]]
    if concurrency and "session" in places:
        raise StartError("--concurrency is measured at a gateway: use --door grpc or openai")
    text = "openai" in places
    launch = Launch(
        model=model,
        load_format=load_format,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        host_blocks=host_blocks,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        target_itl_ms=target_itl_ms,
        workers=workers,
        gateways=0 if places == ["session"] else gateways,
        http=text,
        text=text,
    )
    rates = rate or ([] if concurrency else [10.0])
    plan = suite.Plan(
        online=tuple((one, requests) for one in rates),
        concurrent=tuple((one, requests) for one in concurrency or []),
        places=tuple(places),
        text=text,
        goodput=_limits(goodput),
        scale=_scale(scale, length_scale),
        row_limit_s=row_limit_s,
        limit_s=limit_s,
        online_output=output,
        plot=plot,
        logs=logs,
    )
    given = None
    if connect or gateway or http:
        given = suite.Given(connect, "", tuple(gateway or ()), tuple(http or ()))
    _run(suite.main(plan, launch, given))


def _place(door: str) -> str:
    """Where rows of a door are measured, by its name in rows."""
    places = {"grpc": "gateway", "openai": "openai", "session": "session"}
    if door not in places:
        raise StartError(f"--door {door} is unknown: use {', '.join(places)}")
    return places[door]


def _limits(given: list[str] | None) -> Limits:
    """What --goodput says; what it does not name has no limit. Nothing: the default."""
    from pagewire.bench.serve import DEFAULT_LIMITS, Limits

    if not given:
        return DEFAULT_LIMITS
    limits: dict[str, float] = {}
    for part in ",".join(given).replace(" ", ",").split(","):
        found = GOODPUT.fullmatch(part.strip())
        if found is None:
            raise StartError(f"--goodput {part} is no limit: write ttft:200ms, itl:50ms or e2e:5s")
        limits[f"{found[1]}_ms"] = float(found[2]) * (1.0 if found[3] == "ms" else 1000.0)
    return Limits(limits.get("ttft_ms"), limits.get("itl_ms"), limits.get("e2e_ms"))


def kernels(context: typer.Context) -> None:
    """Times of the CUDA kernels. Options go to benchmarks.kernels: see --help there."""
    import runpy
    import sys
    from importlib.util import find_spec

    # The module is not part of an installation: it is found in a checkout, from its root.
    sys.path.insert(0, str(Path.cwd()))
    if find_spec("benchmarks") is None or find_spec("benchmarks.kernels") is None:
        raise StartError("benchmarks/kernels.py is not here: run this in the root of a checkout")
    sys.argv = ["benchmarks.kernels", *context.args]
    with imports("worker"):
        runpy.run_module("benchmarks.kernels", run_name="__main__", alter_sys=True)


def _scale(requests: float, lengths: float) -> workloads.Scale:
    from pagewire.bench import workloads

    if not 0 < requests <= 1 or not 0 < lengths <= 1:
        raise StartError("--scale and --length-scale must be above 0 and at most 1")
    return workloads.Scale(requests, lengths)


def _run(running: Coroutine[Any, Any, bool]) -> None:
    import uvloop

    try:
        is_complete = uvloop.run(running)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not is_complete:
        raise typer.Exit(1)
