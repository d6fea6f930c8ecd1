"""Two tenants on the real service: one floods it, the other sends a request now and then."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from tests import tiny_models
from tests.scheduler.recordings import events
from tests.service import service


async def test_a_light_tenants_prompts_have_steps_of_their_own_and_nobody_gets_another_answer(tmp_path: Path) -> None:
    model, path = tiny_models.make_tiny_model("llama", tmp_path / "model", max_position_embeddings=256), tmp_path / "r"
    arguments = ["--model", str(model), "--dtype", "float32", "--block-size", "4", "--record", str(path)]
    flood = [[5 + number, 6, 7] for number in range(8)]
    light = [[40 + number] * 4 for number in range(8)]
    async with service.running(tmp_path, *arguments, "--max-num-seqs", "8") as up, up.channel() as channel:
        calls = [service.generate(channel, service.greedy(prompt, 200, tenant="heavy")) for prompt in flood]
        heavy = asyncio.gather(*calls)
        answers = [await service.generate(channel, service.greedy(prompt, 3, tenant="light")) for prompt in light]
        answers += await heavy
    for prompt, completion in zip(light + flood, answers, strict=True):
        reference = tiny_models.reference(model, prompt, len(completion.token_ids))
        sure = next((at for at, gap in enumerate(reference.gaps) if gap <= tiny_models.MIN_GAP), None)
        assert completion.token_ids[:sure] == reference.token_ids[:sure]
    plans = [event.scheduled.step_plan for event in events(path) if event.scheduled.HasField("step_plan")]
    alone = [plan for plan in plans if plan.chunk_tokens and len(plan.decode_remove) > 1]
    assert len(alone) >= 2, "the decode set has sat out nothing"
    assert all(sum(plan.chunk_tokens) in (1, 4) for plan in alone)
    command = [sys.executable, "-m", "pagewire.cli", "replay", "--simulate", str(path)]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=service.ROOT)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
