"""What a step costs on a named machine with a named model.

    step = overhead + rows * overhead per row + max(weight bytes / bandwidth, flops / rate)
         + (KV bytes read and copied) / bandwidth
    swap = copies * overhead per copy + bytes / link rate, before the step, not overlapped with it

The first formula is the "limit" of our performance records with overheads added. Rates are what a machine reaches, not
what its data sheet says. What the model leaves out: kernels that run below these rates for small shapes, and the
scheduler's own time, which hides behind the step before (a plan is made one step ahead).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagewire.simulation.batch import StepLoad
from scheduler.policy import TransferRates, WorkerCapacity

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The part of a model that decides what a step costs."""

    name: str
    weight_bytes: int  # read once per step
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    kv_dtype_bytes: int = 2

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token, keys and values of all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.kv_dtype_bytes

    @property
    def flops_per_token(self) -> float:
        """Matrix products of one token: two operations per 2-byte weight."""
        return float(self.weight_bytes)

    @property
    def attention_flops(self) -> float:
        """Scores and weighted sum of one query token over one context token, all layers."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """A machine with a model on it."""

    name: str
    model: ModelShape
    kv_bytes: int  # KV pool
    host_bytes: int  # host arena
    memory_rate: float  # bytes per second reached by reads of weights and KV
    compute_rate: float  # flops per second reached by matrix products
    link_rate: float  # bytes per second between the pools, each way
    step_overhead_ns: int  # per step: launches and whatever does not shrink with the work
    copy_overhead_ns: int  # per swap copy
    chunk_overhead_ns: int = 0  # per step with a chunk, where such steps are launched in another way
    row_overhead_ns: int = 0  # per sequence and step: host work that grows with the batch
    copies_per_block: int = 1  # swap copies per block; 1: a block is contiguous over all layers
    link_delay_ns: int = 100_000  # one way, scheduler to worker or back
    block_size: int = 16
    max_num_seqs: int = 256
    token_budget: int = 2048

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.model.kv_token_bytes

    @property
    def capacity(self) -> WorkerCapacity:
        """The sizes that this worker tells the scheduler."""
        return WorkerCapacity(
            block_size=self.block_size,
            num_blocks=self.kv_bytes // self.block_bytes,
            host_blocks=self.host_bytes // self.block_bytes,
            block_bytes=self.block_bytes,
            max_slots=self.max_num_seqs + 64,
            max_step_tokens=self.token_budget,
        )

    @property
    def rates(self) -> TransferRates:
        """What this worker would have measured at its start."""
        swap = self.block_bytes * 1e9 / self.swap_ns(1)
        prefill = self.token_budget * 1e9 / self.forward_ns(prefill_load(self.token_budget))
        return TransferRates(round(swap), round(swap), round(prefill))

    def rows(self, load: StepLoad) -> int:
        """Sequences in a step."""
        return load.decode_tokens + load.num_chunks

    def flops(self, load: StepLoad) -> float:
        tokens = load.decode_tokens + load.chunk_tokens
        return tokens * self.model.flops_per_token + self.model.attention_flops * load.attended_pairs

    def kv_traffic(self, load: StepLoad) -> int:
        """Bytes of KV read by attention, and read and written by copy-on-write."""
        return load.context_tokens * self.model.kv_token_bytes + 2 * load.copied_blocks * self.block_bytes

    def forward_ns(self, load: StepLoad) -> int:
        """The step without its swaps."""
        if self.rows(load) == 0:
            return 0
        weights = self.model.weight_bytes / self.memory_rate
        seconds = max(weights, self.flops(load) / self.compute_rate) + self.kv_traffic(load) / self.memory_rate
        launch = self.step_overhead_ns + (self.chunk_overhead_ns if load.num_chunks else 0)
        return launch + self.rows(load) * self.row_overhead_ns + round(seconds * 1e9)

    def swap_ns(self, num_blocks: int) -> int:
        """Copying blocks one way between KV pool and host arena."""
        seconds = num_blocks * self.block_bytes / self.link_rate
        return num_blocks * self.copies_per_block * self.copy_overhead_ns + round(seconds * 1e9)

    def recompute_ns(self, num_tokens: int) -> int:
        """Computing the KV of one sequence of `num_tokens` again, in steps of the token budget."""
        total = 0
        for start in range(0, num_tokens, self.token_budget):
            total += self.forward_ns(prefill_load(min(self.token_budget, num_tokens - start), start))
        return total

    def with_block_size(self, block_size: int) -> WorkerProfile:
        return replace(self, block_size=block_size)


def prefill_load(num_tokens: int, start: int = 0) -> StepLoad:
    """One chunk of one sequence, from position `start` on."""
    return StepLoad(
        num_chunks=1,
        chunk_tokens=num_tokens,
        chunk_context=start + num_tokens,
        chunk_pairs=num_tokens * start + num_tokens * (num_tokens + 1) // 2,
    )


# 7.5e9 parameters without the embedding table, whose rows are looked up and not read.
LLAMA_8B = ModelShape("Llama-3.1-8B", 15_010_000_000, 32, 32, 8, 128, max_model_len=131_072)

# As in the paper's table 1: 26 GB of parameters, 12 GB for KV, which are 15.7 thousand token slots (so GB is 2**30).
OPT_13B = ModelShape("OPT-13B", 26_000_000_000, 40, 40, 40, 128, max_model_len=2048)
LLAMA_13B = replace(OPT_13B, name="LLaMA-13B")

H200_LLAMA_8B = WorkerProfile(
    name="h200-llama-3.1-8b",
    model=LLAMA_8B,
    kv_bytes=96 * GIB,
    host_bytes=64 * GIB,
    memory_rate=4.2e12,  # measured: copies 4.13, FlashAttention-3 reads 4.23
    compute_rate=742e12,  # measured, bf16
    link_rate=55e9,  # measured, pinned
    step_overhead_ns=300_000,  # assumed until a run is recorded
    copy_overhead_ns=2_000,  # assumed
    max_num_seqs=512,
)

# The paper's machine and the engine of its time. The two overheads are fitted, to the two figures that the paper gives
# for its own engine (30.42 requests batched at 2 ShareGPT requests/s, 132.44 at 30 Alpaca requests/s, figure 13). Every
# other figure that a simulation with this profile gives is a prediction.
A100_OPT_13B = WorkerProfile(
    name="a100-40gb-opt-13b",
    model=OPT_13B,
    kv_bytes=12 * GIB,
    host_bytes=12 * GIB,
    memory_rate=1.3e12,  # 84 % of the data sheet's 1.555 TB/s
    compute_rate=200e12,  # 64 % of the data sheet's 312 TFLOP/s
    link_rate=24e9,  # PCIe 4.0 x16, pinned
    step_overhead_ns=9_500_000,
    row_overhead_ns=270_000,
    copy_overhead_ns=4_000,  # assumed: one asynchronous copy call
)

# The same machine with an engine that costs little besides the device's work, as ours means to be.
A100_OPT_13B_LEAN = replace(
    A100_OPT_13B, name="a100-40gb-opt-13b-lean", step_overhead_ns=1_000_000, row_overhead_ns=5_000
)

A100_LLAMA_13B = replace(A100_OPT_13B, name="a100-40gb-llama-13b", model=LLAMA_13B)
