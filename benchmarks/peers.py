"""Peers on the same card, model shape and requests as the offline rows: `python -m benchmarks.peers OUT.json`.

All of the transformers library, in this process:

- `continuous-batching`: its own engine with a paged cache, `init_continuous_batching` and `add_request`, as it chooses
  its settings. It takes FlashAttention where that is installed and torch's attention otherwise; the file says which.
- `continuous-batching-graphs`: the same with CUDA graphs, which it leaves out by itself without FlashAttention.
- `static-batch`: what serving was before: requests in batches in the order of arrival, padded on the left, a contiguous
  cache, and every batch runs until its longest answer is complete. `generate` does the work.

All are greedy and ignore the end of sequence. A row counts the tokens that the requests asked for, as the offline rows
do. One small run of the same kind comes first, so that nothing is compiled or allocated for the first time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from pagewire.bench import results
from pagewire.bench.anchors import CONFIG
from pagewire.bench.results import ROOT
from pagewire.bench.workloads import OFFLINE, Job, Scale, longest, offline, totals

CONFIGS = Path(__file__).parent / "configs"
ENGINES = ("continuous-batching", "continuous-batching-graphs", "static-batch")
WORKLOADS = ("decode-b1", "decode-b32", "decode-b256", "shared-prefix-2048", "alpaca-like-2000")
WARM_UP = 32
"""Requests of the untimed run in front."""
CPU_BLOCKS, CPU_BATCH_TOKENS = 64, 256
RESULT_LIMIT_S = 60.0
"""Longest silence of the continuous-batching engine before its row is given up."""
Run = Callable[[Sequence[Job], float], int]
"""Runs jobs that are all there from the start. Returns how many tokens came that they had asked for. RuntimeError: they
were not done by that time of `time.monotonic`."""


def load(folder: Path, device: torch.device, attention: str) -> Any:
    """A model of that shape with random weights, bfloat16 on a GPU and float32 elsewhere."""
    config = AutoConfig.from_pretrained(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


@contextmanager
def continuous(model: Any, jobs: Sequence[Job], graphs: bool) -> Iterator[Run]:
    """The library's own engine, warmed up, for jobs no longer than these."""
    longest_answer = max(job.max_tokens for job in jobs)
    config = GenerationConfig(do_sample=False, max_new_tokens=longest_answer, eos_token_id=-1)
    chosen: dict[str, Any] = {"use_cuda_graph": True} if graphs else {}
    if model.device.type != "cuda":  # where it would take all of the machine's memory
        chosen |= {"num_blocks": CPU_BLOCKS, "max_batch_tokens": CPU_BATCH_TOKENS}
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(**chosen),
        workload_hints=WorkloadHints(max(len(job.prompt) for job in jobs), longest_answer, len(jobs)),
    ) as manager:

        def run(some: Sequence[Job], ends: float) -> int:
            tokens = 0
            for job in some:
                manager.add_request(job.prompt, max_new_tokens=job.max_tokens)
            for i in range(len(some)):
                done = manager.get_result(timeout=min(RESULT_LIMIT_S, max(0.0, ends - time.monotonic())))
                if done is None:
                    raise RuntimeError(f"{i} of {len(some)} requests were done when the time was over")
                if done.error is not None:
                    raise RuntimeError(str(done.error).splitlines()[0])
                tokens += len(done.generated_tokens)
            return tokens

        yield run


@contextmanager
def static(model: Any, batch_size: int) -> Iterator[Run]:
    """One padded batch after another."""

    def run(some: Sequence[Job], ends: float) -> int:
        for start in range(0, len(some), batch_size):
            if time.monotonic() > ends:
                raise RuntimeError(f"{start} of {len(some)} requests were done when the time was over")
            batch = some[start : start + batch_size]
            width = max(len(job.prompt) for job in batch)
            padding = [width - len(job.prompt) for job in batch]
            ids = [[0] * pad + job.prompt for pad, job in zip(padding, batch, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in padding]
            new = max(job.max_tokens for job in batch)
            config = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
            found = model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
            assert found.shape == (len(batch), width + new)
        return totals(some)[1]

    yield run


def measure(run: Run, jobs: Sequence[Job], device: torch.device, limit_s: float) -> results.Row:
    """One timed run behind a small one, whose prompts are others: nothing of the timed run is in a cache.

    RuntimeError: it takes longer than `limit_s`.
    """
    tokens_in, tokens_out = totals(jobs)
    ends = time.monotonic() + limit_s
    run([Job(job.prompt[::-1], min(job.max_tokens, 4)) for job in jobs[:WARM_UP]], ends)
    _settle(device)
    begin = time.perf_counter()
    tokens = run(jobs, ends)
    _settle(device)
    seconds = time.perf_counter() - begin
    assert tokens == tokens_out, f"{tokens} tokens came; {tokens_out} were asked for"
    return {
        "out_tok_s": round(tokens_out / seconds, 1),
        "total_tok_s": round((tokens_in + tokens_out) / seconds, 1),
        "seconds": round(seconds, 4),
    }


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def fitting_batch(model: Any, jobs: Sequence[Job], limit: int) -> int:
    """The largest batch, at most `limit`, whose padded caches fit into half of the free memory."""
    if model.device.type != "cuda":
        return limit
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    free, _ = torch.cuda.mem_get_info()
    size = max(1, int(free / 2 // (token_bytes * longest(jobs))))
    return min(limit, 1 << (size.bit_length() - 1))


def main() -> int:
    """Measures; exit code 1 when any row has no values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="file for the results")
    parser.add_argument("--model", type=Path, default=CONFIGS / CONFIG, help="folder with a config.json")
    parser.add_argument("--engine", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--workload", nargs="*", choices=OFFLINE, default=list(WORKLOADS))
    parser.add_argument("--attention", default="sdpa", help="what the models attend with, as transformers names it")
    parser.add_argument("--batch", type=int, default=256, help="most requests of a static batch")
    parser.add_argument("--limit-s", type=float, default=420.0, help="no row is begun after that many seconds")
    parser.add_argument("--row-limit-s", type=float, default=120.0, help="a row that takes longer is given up")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--length-scale", type=float, default=1.0)
    given = parser.parse_args()
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(given.model, device, given.attention)
    scale = Scale(given.scale, given.length_scale)
    head = results.header(
        model=str(given.model).replace(f"{ROOT}/", ""), layout="one process", settings={"batch": given.batch}
    )
    recorder = results.Recorder(given.out, {**head, "attention": given.attention})
    for workload in given.workload:
        jobs = offline(workload, scale, model.config.vocab_size)
        for engine in given.engine:
            batch = fitting_batch(model, jobs, given.batch)
            row: results.Row = {"engine": engine, "workload": workload, "requests": len(jobs)}
            if engine == "static-batch":
                row["batch"] = batch
            if time.monotonic() - begin > given.limit_s:
                recorder.add({**row, "error": "no time left"})
                continue
            try:
                graphs = engine == "continuous-batching-graphs"
                with static(model, batch) if engine == "static-batch" else continuous(model, jobs, graphs) as run:
                    row |= measure(run, jobs, device, given.row_limit_s)
                    row["attention"] = model.config._attn_implementation
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            recorder.add(row)
            print({key: value for key, value in row.items() if key != "requests"}, flush=True)
    return 1 if any("error" in row for row in recorder.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
