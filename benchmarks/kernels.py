"""Times the kernels on a CUDA device: `python -m benchmarks.kernels --out results.json`.

Every row is captured in a CUDA graph that runs the kernel once on each of several input sets, together larger than the
L2 cache, and the graph is replayed; the figure is the median replay divided by the number of sets, the spread the
distance from its 10th to its 90th percentile over the median. An attention row is compared with the simple kernel
before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cards
from kernels import activation, attention, cache, linear_wgmma, norm, reference, sampling
from kernels import compile as kernel_compile
from kernels.reference import Settled
from pagewire.bench import results
from pagewire.bench.results import Row

HEADS, KV_HEADS, HEAD_DIM, BLOCK, HIDDEN, INTERMEDIATE, VOCABULARY = 32, 8, 128, 16, 4096, 14336, 128256
"""Llama-3.1-8B."""
BYTES_PER_US, FLOPS_PER_US = (rate * 1e3 for rate in cards.RATES["h200"])
LEAST_LAUNCHES = 16
"""Of a graph."""
COLD_BYTES = 300e6
"""Input sets of a row: several times the L2 cache."""
DECODE = {
    (1, 1024): 10.6,
    (1, 8192): 14.9,
    (1, 65536): 72.8,
    (8, 2048): 25.1,
    (8, 16384): 131.0,
    (32, 1024): 42.6,
    (64, 512): 45.6,
    (64, 4096): 253.6,
    (256, 512): 159.8,
    (256, 2048): 524.0,
}
"""(batch, context) and FlashAttention-3's microseconds on an H200."""
SWEPT = ((1, 1024), (8, 2048), (1, 65536), (32, 1024), (64, 512), (64, 4096), (128, 256), (256, 256), (256, 512))
"""(batch, context) that the sweep over pipelines takes."""
PREFILL = {
    (1, 512, 512): 46,
    (1, 2048, 2048): 119,
    (1, 8192, 8192): 979,
    (8, 1024, 1024): 227,
    (4, 2048, 8192): 1639,
    (16, 256, 4096): 568,
}
"""(sequences, new tokens, context) and FlashAttention-3's microseconds on an H200."""

PREFILL_KERNELS = ("hopper", "wgmma", "mma")


def captured(launches: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of these launches in turns, and how many: so many that its own launch, 4 to 6 us, which a step pays once
    and not once a layer, hardly counts."""
    launches = launches * -(-LEAST_LAUNCHES // len(launches))
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph, len(launches)


def measure(launches: list[Callable[[], object]], replays: int = 30) -> tuple[float, float]:
    """(median microseconds of one launch, relative spread)."""
    graph, count = captured(launches)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / count)
    deciles = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    return median, (deciles[-1] - deciles[0]) / median


def attention_inputs(batch: int, new: int, context: int) -> list[tuple[torch.Tensor, ...]]:
    """Input sets (query, kv_layer, block_tables, context_lens, query_start), blocks placed at random."""
    set_bytes = batch * context * KV_HEADS * HEAD_DIM * 2 * 2
    count = max(1, min(64, round(COLD_BYTES / set_bytes)))
    blocks = batch * -(-context // BLOCK)
    sets = []
    for _ in range(count):
        pool = torch.randn((blocks, 1, 2, KV_HEADS, BLOCK, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
        sets.append(
            (
                torch.randn((batch * new, HEADS, HEAD_DIM), device="cuda", dtype=torch.bfloat16),
                pool[:, 0],
                torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1),
                torch.full((batch,), context, device="cuda", dtype=torch.int32),
                torch.arange(0, batch * new + 1, new, device="cuda", dtype=torch.int32),
            )
        )
    return sets


def check(name: str, out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Compares with the simple kernel. Raises SystemExit on a wrong result: no number without correctness."""
    query, kv_layer, tables, lengths, starts = inputs
    # The simple kernel is slow: of every sequence only the last tokens.
    last = min(int(starts[1]), 128)
    query, out = (x.unflatten(0, (len(lengths), -1))[:, -last:].flatten(0, 1).contiguous() for x in (query, out))
    starts = torch.arange(0, len(query) + 1, last, device="cuda", dtype=torch.int32)
    wanted = torch.empty_like(query)
    attention._simple(query, wanted, kv_layer, tables, lengths, starts, 0, HEAD_DIM**-0.5, None, None)
    error = float((out.double() - wanted.double()).norm() / wanted.double().norm())
    if not error < 5e-3:
        raise SystemExit(f"{name} is wrong: relative error {error}")


def decode_row(batch: int, context: int) -> Row:
    """As from a model's second layer on, and, `waiting_us`, as in its first, where nothing is settled."""
    sets = attention_inputs(batch, 1, context)
    scale = HEAD_DIM**-0.5

    def launch(inputs: tuple[torch.Tensor, ...], settled: Settled = Settled.CONTEXT) -> torch.Tensor:
        return attention.paged_attention_decode(*inputs[:4], scale, settled=settled)

    check(f"decode {batch} x {context}", launch(sets[0]), sets[0])
    us, spread = measure([lambda inputs=inputs: launch(inputs) for inputs in sets])
    waiting, _ = measure([lambda inputs=inputs: launch(inputs, Settled.NOTHING) for inputs in sets])
    moved = batch * context * KV_HEADS * HEAD_DIM * 2 * 2
    return {
        "kernel": "decode",
        "batch": batch,
        "new": 1,
        "context": context,
        "us": us,
        "waiting_us": waiting,
        "tb_s": moved / us / 1e6,
        "limit_us": moved / BYTES_PER_US,
        "peer_us": DECODE.get((batch, context)),
        "spread": spread,
    }


def prefill_row(batch: int, new: int, context: int) -> Row:
    sets = attention_inputs(batch, new, context)[:4]
    scale = HEAD_DIM**-0.5

    def launch(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return attention.paged_attention_prefill(*inputs, scale)

    check(f"prefill {batch} x {new} ({context})", launch(sets[0]), sets[0])
    us, spread = measure([lambda inputs=inputs: launch(inputs) for inputs in sets], replays=15)
    pairs = new * (context - new) + new * (new + 1) // 2
    flops = 4 * HEAD_DIM * HEADS * batch * pairs
    return {
        "kernel": "prefill",
        "batch": batch,
        "new": new,
        "context": context,
        "us": us,
        "tflop_s": flops / us / 1e6,
        "limit_us": flops / FLOPS_PER_US,
        "peer_us": PREFILL.get((batch, new, context)),
        "spread": spread,
    }


def other_rows() -> list[Row]:
    """The small kernels; limits are the bytes that must move."""
    rows: list[Row] = []

    def add(kernel: str, batch: int, moved: float, make: Callable[[], Callable[[], object]]) -> None:
        launches = [make() for _ in range(max(1, min(64, round(COLD_BYTES / moved))))]
        us, spread = measure(launches)
        rates = {"tb_s": moved / us / 1e6, "limit_us": moved / BYTES_PER_US, "spread": spread}
        rows.append({"kernel": kernel, "batch": batch, "us": us, **rates})

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    for tokens in (1, 256, 2048):

        def norms(tokens: int = tokens) -> Callable[[], object]:
            hidden, residual, weight = rand(tokens, HIDDEN), rand(tokens, HIDDEN), rand(HIDDEN)
            return lambda: norm.add_rms_norm(hidden, residual, weight, 1e-5)

        def silus(tokens: int = tokens) -> Callable[[], object]:
            gate_up = rand(tokens, 2 * INTERMEDIATE)
            return lambda: activation.silu_and_mul(gate_up)

        def ropes(tokens: int = tokens) -> Callable[[], object]:
            fused = rand(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
            query, key, value = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            positions, cos_sin = torch.arange(tokens, device="cuda"), rand(tokens, HEAD_DIM, dtype=torch.float32)
            kv_layer = rand(tokens // BLOCK + 1, 1, 2, KV_HEADS, BLOCK, HEAD_DIM)[:, 0]
            return lambda: cache.rope_and_cache(
                query, key, value, positions, cos_sin, kv_layer, positions, settled=True
            )

        add("add_rms_norm", tokens, tokens * HIDDEN * 2 * 4, norms)
        add("silu_and_mul", tokens, tokens * INTERMEDIATE * 2 * 3, silus)
        add("rope_and_cache", tokens, tokens * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2 * 2, ropes)

    for batch in (1, 32, 256):
        for name, settings in (
            ("argmax", None),
            ("sample", (0.8, 50, 0.95, 0.0)),
            ("sample-nucleus", (1.0, 0, 0.95, 0.0)),
            ("sample-all", (1.0, 0, 1.0, 0.0)),
        ):

            def samplers(batch: int = batch, settings: Any = settings) -> Callable[[], object]:
                logits = rand(batch, VOCABULARY, dtype=torch.float32) * 3
                if settings is None:
                    return lambda: sampling.argmax(logits)
                temperature, top_k, top_p, min_p = (torch.full((batch,), x, device="cuda") for x in settings)
                seeds = torch.arange(batch, device="cuda")
                zeros = torch.zeros_like(seeds)
                return lambda: sampling.sample(logits, temperature, top_k, top_p, min_p, seeds, zeros, zeros)

            add(name, batch, batch * VOCABULARY * 4, samplers)
    return rows


def swap_rows() -> list[Row]:
    """Blocks of 2 MiB between pool and pinned arena, by copy engine and by kernel, in GB/s."""
    rows: list[Row] = []
    count, elements = 256, 1 << 20
    pool = torch.randn(count, elements, device="cuda", dtype=torch.bfloat16)
    arena = torch.empty(count, elements, dtype=torch.bfloat16, pin_memory=True)
    ids = torch.randperm(count)
    device_ids, device_order = ids.cuda(), torch.arange(count, device="cuda")

    def engine_out() -> None:
        for i, block in enumerate(ids.tolist()):
            arena[i].copy_(pool[block], non_blocking=True)

    def engine_in() -> None:
        for i, block in enumerate(ids.tolist()):
            pool[block].copy_(arena[i], non_blocking=True)

    def kernel_out() -> None:
        cache.launch_copies(pool, arena, device_ids, device_order)

    def kernel_in() -> None:
        cache.launch_copies(arena, pool, device_order, device_ids)

    for name, run in (
        ("swap_out", engine_out),
        ("swap_in", engine_in),
        ("swap_out-kernel", kernel_out),
        ("swap_in-kernel", kernel_in),
    ):
        run()
        times = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
        us = statistics.median(times)
        rows.append({"kernel": name, "batch": count, "us": us, "gb_s": pool.numel() * 2 / us / 1e3})
    return rows


def eager_row() -> Row:
    """Host microseconds of one decode call outside a graph, its checks and its output's allocation included."""
    problem = attention_inputs(1, 1, 1024)[0][:4]
    attention.paged_attention_decode(*problem, HEAD_DIM**-0.5)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(1000):
        attention.paged_attention_decode(*problem, HEAD_DIM**-0.5)
    us = (time.perf_counter() - begin) * 1000
    torch.cuda.synchronize()
    return {"kernel": "eager-launch", "batch": 1, "us": us}


def sweep() -> list[Row]:
    """Decode with other pipelines than the default: which warps, stages and CTAs are best at each size."""
    rows = []
    original = attention.decode_config
    limits = kernel_compile.limits(torch.device("cuda", 0))
    default = original(HEAD_DIM, HEADS // KV_HEADS, limits, boxes=limits.wgmma)
    for warps, stages, ctas in ((4, 3, 2), (8, 3, 1), (2, 3, 4), (2, 2, 6), (1, 3, 8), (1, 2, 8), (1, 4, 6)):
        config = replace(default, warps=warps, team=warps, stages=stages, ctas=ctas)
        attention.decode_config = lambda *_, config=config, **__: config  # type: ignore[assignment]
        try:
            for batch, context in SWEPT:
                row = decode_row(batch, context)
                rows.append({**row, "warps": warps, "stages": stages, "ctas": ctas})
        except kernel_compile.KernelError as error:
            print(f"sweep {warps} {stages} {ctas}: {error}", flush=True)
        finally:
            attention.decode_config = original
    return rows


@contextmanager
def prefill_kernel(
    hopper: attention.HopperConfig | None, config: attention.PrefillConfig | None = None
) -> Iterator[None]:
    """Has prefill use this kernel of specialised warpgroups or, if None, this one of the others (None: the default)."""
    originals = attention.SPECIALISED_PREFILL, attention.hopper_config, attention.prefill_config
    attention.SPECIALISED_PREFILL = hopper is not None
    attention.hopper_config = lambda *_: hopper  # type: ignore[assignment]
    if config is not None:
        attention.prefill_config = lambda *_: config  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.SPECIALISED_PREFILL, attention.hopper_config, attention.prefill_config = originals


def prefill_rows(only: str | None) -> Iterator[Row]:
    """Every prefill kernel that this GPU has side by side, or `only` one of PREFILL_KERNELS."""
    limits = kernel_compile.limits(torch.device("cuda", 0))
    hopper = attention.hopper_config(HEAD_DIM, BLOCK, limits)
    default = attention.prefill_config(HEAD_DIM, limits)
    kernels = {
        "hopper": (hopper, None),
        "wgmma": (None, default if default.wgmma else None),
        "mma": (None, attention.PrefillConfig(4, 2, 32, 2)),
    }
    used = next(name for name, choice in kernels.items() if any(choice))
    for shape in PREFILL:
        for name, choice in kernels.items():
            if only in (None, name) and any(choice):
                with prefill_kernel(*choice):
                    yield {**prefill_row(*shape), "kernel": "prefill" if name == used else f"prefill {name}"}


def prefill_sweep() -> Iterator[Row]:
    """Prefill with other tiles and pipelines than the default."""
    default = attention.hopper_config(HEAD_DIM, BLOCK, kernel_compile.limits(torch.device("cuda", 0)))
    changes: list[dict[str, Any]] = [{}, {"ping_pong": False}, {"stages": 4}]
    changes += [{"kv_tile": 64, "stages": 10}]
    for change in changes if default else []:
        with prefill_kernel(replace(default, **change)):
            for shape in PREFILL:
                yield {**prefill_row(*shape), "kernel": "prefill hopper", "change": change}
    for warps, kv_tile, ctas in ((12, 64, 1), (8, 64, 2), (8, 128, 1)):
        with prefill_kernel(None, attention.PrefillConfig(warps, 1, kv_tile, ctas, wgmma=True)):
            for shape in PREFILL:
                row = {**prefill_row(*shape), "warps": warps, "kv_tile": kv_tile, "ctas": ctas}
                yield {**row, "kernel": "prefill wgmma"}


def linear_rows() -> list[Row]:
    """A layer's products and the small operations between them for up to 256 tokens: the library's way and ours; and
    from 16 on gate and up projection with SwiGLU by themselves."""
    layers = 10  # together larger than the L2 cache
    shapes = {"qkv": (6144, HIDDEN), "output": (HIDDEN, HIDDEN), "gate_up": (2 * INTERMEDIATE, HIDDEN)}
    shapes["down"] = (HIDDEN, INTERMEDIATE)
    weights = [
        {
            name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[1] ** -0.5
            for name, shape in shapes.items()
        }
        for _ in range(layers)
    ]
    weight_bytes = sum(matrix.nbytes for matrix in weights[0].values())
    scale = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    rows = []
    for tokens in (1, 4, 8, 16, 32, 64, 128, 192, 256, 1024, 2048, 8192):
        hidden, attended = (torch.randn((tokens, HIDDEN), device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def library(hidden: torch.Tensor = hidden, attended: torch.Tensor = attended) -> None:
            residual = hidden.clone()
            for layer in weights:
                torch.nn.functional.linear(norm.add_rms_norm(hidden, residual, scale, 1e-5)[0], layer["qkv"])
                out = torch.nn.functional.linear(attended, layer["output"])
                out = torch.nn.functional.linear(norm.add_rms_norm(out, residual, scale, 1e-5)[0], layer["gate_up"])
                hidden = torch.nn.functional.linear(activation.silu_and_mul(out), layer["down"])

        def product(x: torch.Tensor, matrix: torch.Tensor, by: reference.Product = "linear") -> torch.Tensor:
            if linear_wgmma.takes_tokens(len(x), matrix, by=by):
                return getattr(linear_wgmma, by)(x, matrix)
            return torch.nn.functional.linear(x, matrix)

        def ours(hidden: torch.Tensor = hidden, attended: torch.Tensor = attended) -> None:
            residual = hidden.clone()
            for layer in weights:
                product(norm.add_rms_norm(hidden, residual, scale, 1e-5)[0], layer["qkv"])
                out = product(attended, layer["output"], "linear_parts")
                normed = norm.add_rms_norm(out, residual, scale, 1e-5)[0]
                hidden = product(linear_wgmma.linear_gated(normed, layer["gate_up"]), layer["down"], "linear_parts")

        def note(
            name: str, launches: list[Callable[[], object]], moved: int, in_each: int = 1, tokens: int = tokens
        ) -> None:
            us, spread = measure(launches)
            us /= in_each
            row = {"kernel": name, "batch": tokens, "us": us}
            if tokens <= 256:
                row |= {"tb_s": moved / us / 1e6, "limit_us": moved / BYTES_PER_US}
            else:  # as many operations as there are bytes of weights, for every token
                row |= {"tflop_s": tokens * moved / us / 1e6, "limit_us": tokens * moved / FLOPS_PER_US}
            rows.append({**row, "spread": spread})

        if tokens <= 256:
            note("linear library", [library], weight_bytes, layers)
            note("linear ours", [ours], weight_bytes, layers)
        if tokens < 16:
            continue
        x = torch.randn((tokens, HIDDEN), device="cuda", dtype=torch.bfloat16)

        def gated_by_library(matrix: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return activation.silu_and_mul(torch.nn.functional.linear(x, matrix))

        gate_ups = [layer["gate_up"] for layer in weights]
        for way, multiply in {"library": gated_by_library, "wgmma": partial(linear_wgmma.linear_gated, x)}.items():
            note(f"gate_up {way}", [partial(multiply, matrix) for matrix in gate_ups], gate_ups[0].nbytes)
    return rows


def table(rows: list[Row]) -> str:
    """Rows for people."""
    columns = (("batch", 6), ("new", 6), ("context", 8), ("us", 10), ("rate", 14), ("limit us", 10), ("peer us", 9))
    lines = [f"{'kernel':<16}" + "".join(f"{name:>{width}}" for name, width in columns) + f"{'spread':>8}"]
    for row in rows:
        rate = next((f"{row[key]:.3g} {key}" for key in ("tb_s", "tflop_s", "gb_s") if key in row), "")
        shape = "".join(f"{row.get(key, ''):>{width}}" for key, width in (("batch", 6), ("new", 6), ("context", 8)))
        limit = f"{row['limit_us']:.1f}" if "limit_us" in row else ""
        spread = f"{row['spread']:.1%}" if "spread" in row else ""
        config = "".join(f" {key}={row[key]}" for key in ("warps", "stages", "kv_tile", "ctas", "change") if key in row)
        peer = row.get("peer_us") or ""
        lines.append(f"{row['kernel']:<16}{shape}{row['us']:>10.1f}{rate:>14}{limit:>10}{peer:>9}{spread:>8}{config}")
    return "\n".join(lines)


def decode_size(text: str) -> tuple[int, int]:
    """ "480x85" as (batch, context). Raises ValueError."""
    batch, context = text.split("x")
    return int(batch), int(context)


def main() -> None:
    """Runs the rows asked for; writes JSON if told where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--only", choices=("decode", "prefill", "linear", "other", "swap", "sweep", "prefill-sweep"), action="append"
    )
    parser.add_argument("--prefill", choices=PREFILL_KERNELS, help="time this prefill kernel only")
    parser.add_argument(
        "--decode",
        type=decode_size,
        nargs="+",
        default=list(DECODE),
        metavar="BATCHxCONTEXT",
        help="decode rows to time",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(arguments.seed)
    wanted = arguments.only or ["decode", "prefill", "linear", "other", "swap"]
    recorder = results.Recorder(arguments.out, results.header(cuda=torch.version.cuda, seed=arguments.seed))

    def note(new: list[Row]) -> None:
        print(table(new).split("\n", 1)[1], flush=True)
        for row in new:
            recorder.add(row)

    if "decode" in wanted:
        for batch, context in arguments.decode:
            note([decode_row(batch, context)])
    if "prefill" in wanted:
        for row in prefill_rows(arguments.prefill):
            note([row])
    if "other" in wanted:
        note([eager_row()])
        note(other_rows())
    if "swap" in wanted:
        note(swap_rows())
    if "linear" in wanted:
        note(linear_rows())
    if "sweep" in wanted:
        note(sweep())
    if "prefill-sweep" in wanted:
        for row in prefill_sweep():
            note([row])
    print(table(recorder.rows))


if __name__ == "__main__":
    main()
