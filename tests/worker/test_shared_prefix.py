"""What decode rows have in common, and steps that read it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.kv_layout import KvLayout
from kernels.reference import Settled, SharedPrefix
from tests import tiny_models
from tests.worker.test_engine import Steps, device  # noqa: F401  (a fixture)
from worker import executor as executor_module
from worker import shared_prefix
from worker.config import WorkerSettings
from worker.executor import Executor
from worker.kv_pool import KvPool
from worker.models.loader import load_model
from worker.shared_prefix import Slots, largest
from worker.start import make_executor
from worker.step import NewSequence, Sampling

BLOCK = 16
CPU = torch.device("cpu")


def tables_of(paths: list[list[int]], known: list[int]) -> tuple[np.ndarray, Slots, Slots]:
    """Block tables of rows that begin with shared blocks and go on with their own."""
    columns = max(-(-tokens // BLOCK) for tokens in known)
    tables = np.zeros((len(paths), columns), dtype=np.int32)
    own = 10_000
    for row, path in enumerate(paths):
        count = -(-known[row] // BLOCK)
        blocks = [*path[: (known[row] - 1) // BLOCK], *range(own, own + count)][:count]
        own += count
        tables[row, :count] = blocks
    return tables, np.array(known), np.arange(len(paths))


def test_a_system_prompt_is_found_among_rows_that_do_not_have_it() -> None:
    system = list(range(100, 228))
    paths = [system] * 20 + [[]] * 5
    found = largest(*tables_of(paths, [2048 + 30] * 20 + [500] * 5), BLOCK)
    assert found
    assert found.slots.tolist() == list(range(20))
    assert found.blocks == 128


def test_the_block_that_is_written_to_is_never_shared() -> None:
    system = list(range(100, 228))
    found = largest(*tables_of([system] * 20, [2048] * 20), BLOCK)
    assert found
    assert found.blocks == 127, "the last token's key goes into block 127"


@pytest.mark.parametrize(("rows", "tokens"), [(15, 8192), (20, 512)])
def test_few_rows_or_few_tokens_are_not_worth_a_kernel(rows: int, tokens: int) -> None:
    path = list(range(100, 100 + tokens // BLOCK))
    assert largest(*tables_of([path] * rows, [tokens + 5] * rows), BLOCK) is None


@settings(deadline=None)
@given(st.data())
def test_whatever_is_found_is_in_every_row_and_behind_it_rows_differ_or_end(data: st.DataObject) -> None:
    trunk = list(range(1, 200))
    cuts = data.draw(st.lists(st.integers(0, 199), min_size=16, max_size=40))
    paths = [trunk[:cut] for cut in cuts]
    known = [data.draw(st.integers(cut * BLOCK + 1, cut * BLOCK + 40)) for cut in cuts]
    tables, lens, slots = tables_of(paths, known)
    found = largest(tables, lens, slots, BLOCK)
    # Worth it at any depth that a doubling search looks at: then something is found.
    worth = any(
        (members := sum((n - 1) // BLOCK >= depth and cut >= depth for n, cut in zip(known, cuts, strict=True))) >= 16
        and members * depth * BLOCK >= shared_prefix.FEWEST_TOKENS
        for depth in (1, 2, 4, 8, 16, 32, 64, 128)
    )
    assert found is not None or not worth
    if found is None:
        return
    rows = tables[found.slots]
    assert found.slots.size >= 16
    assert (rows[:, : found.blocks] == rows[0, : found.blocks]).all()
    full = (lens[found.slots] - 1) // BLOCK
    assert (full >= found.blocks).all()
    assert full.min() == found.blocks or len(set(rows[:, found.blocks].tolist())) > 1


ROWS, PREFIX = 20, 128


class LookedAt:
    """The twins; attention notes what it is told about shared prefixes and holds it against the block tables."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def paged_attention_decode(
        self,
        query: torch.Tensor,
        kv_layer: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        *rest: Any,
        out: torch.Tensor | None = None,
        shared: SharedPrefix | None = None,
        settled: Settled = Settled.NOTHING,
    ) -> torch.Tensor:
        if shared is not None:
            length = int(shared.length)
            columns = length // BLOCK
            members = shared.row_lens > 0
            assert (shared.row_lens[members] == length).all()
            assert (context_lens[members] > length).all()
            assert (block_tables[members, :columns] == shared.block_table[0, :columns]).all()
            assert shared.query_start.tolist() == [0, len(query)]
            self.lengths.append(length)
        return reference.paged_attention_decode(query, kv_layer, block_tables, context_lens, *rest, out=out)


@pytest.mark.parametrize("buckets", [(), (8, 32)])
def test_a_step_tells_attention_what_its_rows_share_until_too_few_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: tuple[int, ...]
) -> None:
    monkeypatch.setattr(shared_prefix, "FEWEST_TOKENS", ROWS * PREFIX)
    monkeypatch.setattr(executor_module, "shares_prefixes", lambda *given: True)
    model = load_model(
        str(tiny_models.make_tiny_model("llama", tmp_path / "model", max_position_embeddings=512)), device=CPU
    )
    spec, kernels = model.spec, LookedAt()
    layout = KvLayout(spec.num_layers, spec.num_kv_heads, BLOCK, spec.head_dim, spec.dtype)
    pools = [torch.full(layout.pool_shape(count), float("nan"), dtype=layout.dtype) for count in (60, 1)]
    executor = Executor(
        model,
        KvPool(layout, *pools),
        max_slots=ROWS + 1,
        max_step_tokens=256,
        max_model_len=spec.max_model_len,
        buckets=buckets,
        kernels=kernels,
    )
    play(executor)
    assert kernels.lengths == [PREFIX] * (4 * spec.num_layers)


def play(executor: Executor, rows: int = ROWS, prefix: int = PREFIX) -> list[dict[int, tuple[int, float]]]:
    """Rows behind one prefix, and one row without: the token and its log-probability by slot, of each step."""
    steps = Steps(executor)
    generator = np.random.default_rng(3)
    prompt = generator.integers(5, 40, prefix).tolist()
    common = list(range(prefix // BLOCK))
    greedy = Sampling(temperature=0.0)

    def new(slot: int, tokens: list[int], computed: int, blocks: list[int]) -> NewSequence:
        return NewSequence(
            slot=slot, token_ids=tokens, prompt_tokens=len(tokens), computed_tokens=computed, blocks=blocks,
            sampling=greedy, logprobs=0,
        )  # fmt: skip

    own = iter(range(len(common), executor.pool.num_blocks))
    first = new(0, [*prompt, 6, 7], 0, [*common, next(own)])
    steps.run(new_sequences=[first], chunk_slots=[0], chunk_tokens=[prefix + 2])
    others = [new(slot, [*prompt, slot], prefix, [*common, next(own)]) for slot in range(1, rows)]
    others.append(new(rows, [9] * 20, 0, [next(own), next(own)]))
    slots = list(range(1, rows + 1))
    steps.run(new_sequences=others, decode_add=[0], chunk_slots=slots, chunk_tokens=[*[1] * (rows - 1), 20])
    steps.run(decode_add=slots)
    for _ in range(3):
        steps.run()
    shared = executor.batch.shared
    steps.run(release_slots=slots[1:-1])  # too few are left
    assert executor.batch.shared is None
    assert shared is None or (shared.slots.tolist(), shared.blocks) == (list(range(rows)), len(common))
    results = steps.finish()
    assert not any(result.nonfinite_rows for result in results)
    answered: list[dict[int, tuple[int, float]]] = []
    for result in results:
        entries = [entry.logprob for entry in result.logprobs if entry]
        of = {1: [0], 3: [0, 1, rows]}.get(len(entries), range(rows + 1))
        answered.append(dict(zip(of, zip(result.token_ids, entries, strict=True), strict=True)))
    return answered


def make(model: Path, device: torch.device, *, graphs: bool) -> Executor:  # noqa: F811
    settings = WorkerSettings(
        block_size=BLOCK, num_blocks=60, host_blocks=0, max_num_seqs=ROWS + 1, token_budget=256, decode_graphs=graphs
    )
    return make_executor(settings, load_model(str(model), device=device, dtype="float16"), device)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_reading_a_shared_prefix_once_gives_the_same_log_probabilities(
    tmp_path: Path,
    device: torch.device,  # noqa: F811
    graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model", head_dim=64, max_position_embeddings=512)
    monkeypatch.setattr(shared_prefix, "FEWEST_TOKENS", ROWS * PREFIX)
    once = make(model, device, graphs=graphs)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    assert once.batch._shares_prefixes == hopper
    monkeypatch.setattr(shared_prefix, "FEWEST_ROWS", 10**6)
    each = play(make(model, device, graphs=graphs))
    monkeypatch.setattr(shared_prefix, "FEWEST_ROWS", 16)
    apart: set[int] = set()
    for ours, theirs in zip(play(once), each, strict=True):
        assert ours.keys() == theirs.keys()
        for slot in ours.keys() - apart:
            (token, logprob), (other, expected) = ours[slot], theirs[slot]
            assert logprob == pytest.approx(expected, abs=0.01)
            if token != other:  # two that are as likely as each other: what follows is another text
                apart.add(slot)
    assert len(apart) < 3
