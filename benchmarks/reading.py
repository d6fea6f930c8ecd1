"""What reading costs on a CUDA device of compute capability 9.0: `python -m benchmarks.reading --out FILE`.

Kernels that read and do nothing else: 1 GiB in pieces of a size at random places, and a layer's keys and values as
decode attention reads them (64 sequences of 4,096 tokens in random blocks of 16, 8 heads of 128 elements), copied by
lanes, 16 bytes each, or as boxes of a tensor map. A row has the rate of the first replays and of those after half a
second, with the clock and the power draw at that time.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.kernels import captured
from kernels import compile as kernel_compile
from kernels.attention import kv_boxes
from pagewire.bench import results
from pagewire.bench.results import Row

HEADS, HEAD_DIM, BLOCK = 8, 128, 16
"""Of a layer."""
PIECE_BYTES = (65536, 32768, 16384, 8192, 4096, 2048, 1024, 512)
WARPS = 8
"""Of a multiprocessor."""
SOURCE = str(Path(__file__).with_suffix(".cu"))
STEP_BYTES, STAGES = 16384, 12
"""Of pieces: what a CTA reads at a time, and how many of those it has room for."""


@dataclass(frozen=True)
class Reader:
    """How the warps of a CTA share a layer."""

    side: bool
    warps: int
    ctas: int
    """On a multiprocessor."""
    stages: int = 3


READERS = {
    "teams of two": Reader(side=False, warps=2, ctas=4),
    "teams of four": Reader(side=False, warps=4, ctas=2),
    "side by side": Reader(side=True, warps=8, ctas=1),
}


def read_pieces(data: torch.Tensor, piece: int, *, check: bool = False) -> tuple[Callable[[], object], torch.Tensor]:
    """A launch that reads all of `data`, a multiple of 16 KiB of bytes, in pieces of so many bytes in random order; and
    where with `check` each CTA leaves sum of the words that it has read: int32 [CTAs]."""
    device, processors = data.device, kernel_compile.limits(data.device).processors
    place = torch.randperm(data.nbytes // piece).to(device, torch.int32)
    found = torch.zeros(processors, dtype=torch.int32, device=device)
    kernel = kernel_compile.kernel(SOURCE, "read_pieces", device, PIECE=piece, STAGES=STAGES, CHECK=int(check))
    arguments = (found.data_ptr(), data.data_ptr(), place.data_ptr(), data.nbytes // STEP_BYTES)

    def launch(_: torch.Tensor = place) -> None:
        kernel((processors, 1, 1), 256, WARPS * STAGES * 2048, *arguments)

    return launch, found


def read_layer(
    kv: torch.Tensor, length: int, reader: Reader, *, boxes: bool, check: bool = False
) -> tuple[Callable[[], object], torch.Tensor]:
    """As `read_pieces`, of a layer [blocks, 2, HEADS, BLOCK, HEAD_DIM], sequences of `length` blocks."""
    device, blocks = kv.device, len(kv)
    table = torch.randperm(blocks).to(device, torch.int32)
    grid = kernel_compile.limits(device).processors * reader.ctas
    found = torch.zeros(grid, dtype=torch.int32, device=device)
    shape = {"SIDE": int(reader.side), "WARPS": reader.warps, "STAGES": reader.stages}
    kernel = kernel_compile.kernel(SOURCE, "read_layer", device, BOXES=int(boxes), CHECK=int(check), **shape)
    found_boxes = kv_boxes(kv, HEAD_DIM // 64, 2)
    assert found_boxes is not None
    view = kernel_compile.tensor_map(device, found_boxes)
    shared = 1024 + reader.warps * reader.stages * (2 * BLOCK * (HEAD_DIM * 2 + 16 * (not boxes)) + 8)
    arguments = (found.data_ptr(), kv.data_ptr(), view, table.data_ptr(), blocks, length)

    def launch(_: torch.Tensor = table) -> None:
        kernel((grid, 1, 1), reader.warps * 32, shared, *arguments)

    return launch, found


def watched() -> dict[str, float]:
    """Clock of the multiprocessors and power draw, by nvidia-smi."""
    names = ("clocks.sm", "power.draw.instant")
    gpu = str(torch.cuda.get_device_properties(0).uuid)
    command = ["nvidia-smi", f"--id=GPU-{gpu}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(",")
    return {"sm_mhz": float(said[0]), "watts": float(said[1])}


def sustained(launches: list[Callable[[], object]], read_bytes: int, seconds: float = 0.6) -> Row:
    """Rates of the first replays of a graph of these launches, and after so many seconds of them."""
    graph, count = captured(launches)
    graph.replay()

    def replay(times: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        return begin, end

    def us(events: tuple[torch.cuda.Event, torch.cuda.Event], times: int) -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) * 1000 / times / count

    first = us(replay(5), 5)
    times = max(5, int(seconds * 1e6 / first / count))
    replay(times)
    events = replay(times)
    time.sleep(seconds * 1.2)
    told = watched()
    later = us(events, times)
    rates = {"first_tb_s": round(read_bytes / first / 1e6, 3), "tb_s": round(read_bytes / later / 1e6, 3)}
    return {"us": round(later, 1), **rates, **told}


def main() -> None:
    """Takes all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--sets", type=int, default=2, help="tensors of 1 GiB that are read in turns")
    given = parser.parse_args()
    torch.manual_seed(0)
    recorder = results.Recorder(given.out, results.header(seed=0))
    blocks = (1 << 30) // (2 * HEADS * BLOCK * HEAD_DIM * 2)
    shape = (blocks, 2, HEADS, BLOCK, HEAD_DIM)
    layers = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(given.sets)]

    def note(name: str, launches: list[Callable[[], object]]) -> None:
        recorder.add({"reading": name, **sustained(launches, layers[0].nbytes)})
        print(recorder.rows[-1], flush=True)

    for piece in PIECE_BYTES:
        note(f"pieces of {piece} bytes", [read_pieces(layer, piece)[0] for layer in layers])
    for name, reader in READERS.items():
        for boxes in (False, True):
            launches = [read_layer(layer, 4096 // BLOCK, reader, boxes=boxes)[0] for layer in layers]
            note(f"{name}, by {'boxes' if boxes else 'lanes'}", launches)


if __name__ == "__main__":
    main()
