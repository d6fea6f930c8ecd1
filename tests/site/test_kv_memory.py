"""The calculator on the page about memory, beside the functions of the worker that it stands for."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.kv_layout import KvLayout
from pagewire.runtime.errors import StartError
from worker.kv_pool import pool_size

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SCRIPT = """
const kv = require(process.argv[1]);
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(({ model, limits, memory, tokens }) => {
  const blocks = kv.poolBlocks(model, limits, memory);
  return { bytes: kv.blockBytes(model), blocks, fit: blocks && kv.fit(blocks, model, limits, tokens) };
})));
"""


def case(draw: random.Random) -> dict[str, Any]:
    max_model_len = draw.choice([2, 1000, 4096, 32768, 131072])
    return {
        "model": {
            "layers": draw.randint(1, 80),
            "kvHeads": draw.choice([1, 2, 8, 40]),
            "headSize": draw.choice([64, 80, 96, 128, 256]),
            "dtypeBytes": draw.choice([2, 4]),
            "blockSize": 2 ** draw.randint(0, 8),
        },
        "limits": {"maxModelLen": max_model_len, "maxNumSeqs": draw.choice([1, 8, 256, 4096])},
        "memory": {
            "device": draw.choice(["cuda", "cpu"]),
            "free": draw.randint(0, 140 << 30),
            "utilization": draw.choice([0.1, 0.5, 0.9, 1.0]),
            "reserved": draw.choice([0, 1, 3 << 30, 200 << 30]),
        },
        "tokens": draw.randint(1, max_model_len),
    }


def in_python(given: dict[str, Any]) -> int | None:
    """Blocks that a worker takes; None: it refuses to start."""
    model, memory = given["model"], given["memory"]
    try:
        return pool_size(
            layout(model),
            wanted_blocks=0,
            max_num_seqs=given["limits"]["maxNumSeqs"],
            max_model_len=given["limits"]["maxModelLen"],
            free=memory["free"],
            device=torch.device(memory["device"]),
            utilization=memory["utilization"],
            reserved=memory["reserved"],
        )
    except StartError:
        return None


def layout(model: dict[str, Any]) -> KvLayout:
    return KvLayout(
        model["layers"], model["kvHeads"], model["blockSize"], model["headSize"], DTYPES[model["dtypeBytes"]]
    )


def in_javascript(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    run = subprocess.run(
        [node, "-e", SCRIPT, str(ROOT / "docs/assets/kv_memory.js")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[dict[str, Any]] = json.loads(run.stdout)
    return answers


def test_the_calculator_gives_the_blocks_that_a_worker_takes() -> None:
    draw = random.Random(7)
    cases = [case(draw) for _ in range(2000)]
    expected = [in_python(given) for given in cases]
    assert 200 < expected.count(None) < 1800, "both verdicts must occur"
    for given, blocks, answer in zip(cases, expected, in_javascript(cases), strict=True):
        assert answer["blocks"] == blocks, given
        assert answer["bytes"] == layout(given["model"]).block_bytes


def test_the_calculator_fits_sequences_as_the_block_table_would() -> None:
    draw = random.Random(11)
    cases = [case(draw) for _ in range(2000)]
    for given, answer in zip(cases, in_javascript(cases), strict=True):
        if answer["blocks"] is None:
            continue
        kv, fit, tokens = layout(given["model"]), answer["fit"], given["tokens"]
        each = kv.blocks_for(tokens)
        assert fit["blocksEach"] == each
        assert fit["sequences"] == min(given["limits"]["maxNumSeqs"], answer["blocks"] // each)
        assert fit["sequences"] * each <= answer["blocks"]
        assert fit["waste"] == pytest.approx((each * kv.block_size - tokens) / (each * kv.block_size), abs=1e-12)
        pieces = answer["blocks"] * kv.block_size // given["limits"]["maxModelLen"]
        assert fit["contiguous"] == min(given["limits"]["maxNumSeqs"], pieces)


def test_a_block_of_llama_8b_is_two_mebibytes() -> None:
    llama = {"layers": 32, "kvHeads": 8, "headSize": 128, "dtypeBytes": 2, "blockSize": 16}
    memory = {"device": "cuda", "free": 10 << 30, "utilization": 1.0, "reserved": 0}
    limits = {"maxModelLen": 1024, "maxNumSeqs": 100}
    answer = in_javascript([{"model": llama, "limits": limits, "memory": memory, "tokens": 1000}])[0]
    assert answer["bytes"] == 2 << 20
    assert answer["blocks"] == 5120
    assert answer["fit"]["sequences"] == 81
