"""The worker's settings."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pagewire.bundled import BUNDLED_MODEL
from pagewire.runtime.settings import RoleSettings


class WorkerSettings(RoleSettings):
    """Holds a model's weights and KV blocks on one device and executes the scheduler's step plans."""

    role: ClassVar[str] = "worker"

    scheduler: str = "127.0.0.1:50052"
    """Address of the scheduler, HOST:PORT or unix:PATH. The default is the scheduler's own default."""
    model: str = str(BUNDLED_MODEL)
    """Directory of a model, or its id on the Hugging Face hub. The default is the small model that Pagewire ships."""
    served_model_name: str = ""
    """Name under which clients ask for the model. Empty: the directory's last part, or the hub id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: cuda if there is a usable GPU, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV blocks. auto: the checkpoint's own on a GPU, float32 on the CPU."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto reads safetensors; dummy makes random weights from the config alone, for measuring."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest sequence, prompt and output together, in tokens. Unset: what the model's config says."""
    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens in a KV block, a power of two. 16: small enough to waste under 4 %, large enough for fast kernels."""
    num_blocks: int = Field(default=0, ge=0)
    """Blocks in the KV pool. 0: from the memory that is free after loading."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU memory left after loading that steps and KV blocks may take. The rest is for decode graphs, the
    driver and other processes."""
    decode_graphs: bool = True
    """Replay decode steps as CUDA graphs. Without, every kernel is launched by itself: slower, for comparisons."""
    chunk_graphs: bool = True
    """Replay the forward pass of steps with up to 1,024 prompt tokens as CUDA graphs too. Without, such a step takes
    the host several milliseconds to launch; with them the start takes about 10 s longer."""
    host_blocks: int | None = Field(default=None, ge=0)
    """Blocks in the swap arena in RAM. 0: no swapping. Unset: half the pool, within a tenth of the free RAM."""
    max_num_seqs: int = Field(default=256, ge=1, le=65_536)
    """Rows of the persistent batch: sequences that can run at once. 256: what the scheduler asks for by default."""
    token_budget: int = Field(default=2048, ge=1, le=1 << 22)
    """Most tokens that one step may compute. 2048: the scheduler's own default."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of one operation. 0: one per core, or OMP_NUM_THREADS if set."""
    metrics_port: int | None = Field(default=None, le=65535)
    """Port of the Prometheus page, on metrics_host. 0 picks a free one; unset or negative: no page."""
    metrics_host: str = "127.0.0.1"
    """Host name or address that the Prometheus page listens on. Loopback because it needs no password."""
