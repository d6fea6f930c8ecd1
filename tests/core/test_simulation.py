"""Thousands of random lives of a dispatcher with simulated workers; every one must end with the one right output.

A scenario is a seed. Run one alone with `python -m tests.core.test_simulation SEED`.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter, deque

import pytest

from scheduler.dispatcher import (
    Admission,
    Admitted,
    Continuation,
    Dispatcher,
    Failed,
    Finished,
    FinishReason,
    ParkingVerdict,
    SchedulerConfig,
    StatusCode,
    StepOutput,
    TransferRates,
    WorkerCapacity,
)
from scheduler.sequence import Finish, Request, Sequence, SequenceGroup
from scheduler.step_plan import StepPlan, StepResult
from tests.core.simulated_worker import (
    Behaviour,
    SimulatedWorker,
    WorkerDiedError,
    logprob_of,
    undisturbed_beams,
    undisturbed_output,
)

SEEDS_PER_TEST = 300
NUM_TESTS = 8


class Link:
    """A worker's process and both directions of its stream."""

    def __init__(self, worker: SimulatedWorker) -> None:
        self.worker = worker
        self.plans: deque[StepPlan] = deque()
        self.results: deque[StepResult] = deque()
        self.delivered: list[StepResult] = []


class Simulation:
    """One scenario: a random load, random faults, every promise checked after every step."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        choose, chance = self.random.choice, self.random.random
        self.now = 0
        self.epoch = 0
        self.block_size = choose([1, 2, 4, 4, 8])
        # Tiny pools: some requests outgrow them, most collide.
        self.pool_tokens = choose([16, 24, 40, 40, 64, 64, 100, 200])
        self.config = SchedulerConfig(
            max_num_seqs=choose([2, 4, 8, 16]),
            token_budget=choose([4, 7, 16, 64]),
            target_itl_ns=choose([0, 0, 0, 70_000]),
            preemption_mode=choose(["auto", "swap", "recompute"]),
            max_preemptions=choose([1, 2, 16]),
            prefix_cache=chance() < 0.7,
            host_prefix_cache=chance() < 0.5,
            max_waiting=choose([4, 100]),
            watermark=choose([0.0, 0.01, 0.1]),
            headroom=choose([0.0, 0.3, 2.0]),
            retention_ns=10**12,
            max_plans_in_flight=choose([1, 2, 2, 2, 3]),
            park_ceiling_ns=choose([20, 10**12, 10**12]),
            max_parked=choose([2, 1000]),
            max_parked_per_tenant=choose([1, 64]),
            park_arena_share=choose([0.3, 1.0]),
        )
        self.parking = choose([0.0, 0.02, 0.05])  # how often clients park and continue
        self.meddling = choose([0.0, 0.005, 0.02])  # how often clients cancel and gateways find stop strings
        self.has_faulty_requests = chance() < 0.25
        self.has_lossy_workers = chance() < 0.4
        self.has_deadly_requests = chance() < 0.2
        self.has_unruly_results = chance() < 0.3
        self.has_priorities = chance() < 0.3
        self.dispatcher = Dispatcher(self.config)
        self.links: dict[str, Link] = {}
        self.idle: set[str] = set()  # workers that had nothing to plan, and no result or call from the dispatcher since
        self.dead: list[Link] = []
        self.groups: list[SequenceGroup] = []
        self.streams: dict[Sequence, list[int]] = {}
        self.ends: Counter[Sequence] = Counter()
        self.admitted: Counter[SequenceGroup] = Counter()
        self.stopped: dict[Sequence, int] = {}
        self.stale_sent = 0
        self.statistics: Counter[str] = Counter()
        stem = [self.random.randrange(60) for _ in range(30)]
        self.stems = [stem, stem[:9] + [self.random.randrange(60) for _ in range(21)]]
        self.num_requests = self.random.randint(1, 16)
        self.tenants = ["", "", "tenant"]

    # ---- what happens

    def run(self) -> Counter[str]:
        if self.random.random() < 0.3:
            self.dispatcher.pin_prefix("", self.stems[0])
        for _ in range(self.random.randint(1, 3)):
            self.join()
        while len(self.groups) < self.num_requests:
            self.happen()
            self.dispatcher.check_integrity()
        for _ in range(100):
            self.happen()
            self.dispatcher.check_integrity()
        self.drain()
        self.check_end()
        return self.statistics

    def happen(self) -> None:
        self.now += self.random.randint(1, 5)
        dice = self.random.random()
        if dice < self.meddling and self.groups:
            group = self.random.choice(self.groups)
            if self.dispatcher.abort(group.request.request_id, FinishReason.CANCELLED, self.now):
                self.statistics["aborted"] += 1
            self.collect(StepOutput())
        elif dice < 2 * self.meddling and self.groups:
            self.stop_one()
        elif 0.1 < dice < 0.1 + self.parking and self.groups:
            self.park_one()
        elif 0.2 < dice < 0.2 + 2 * self.parking and self.groups:
            continuable = [group for group in self.groups if group.keep_until is not None]
            unlikely = not continuable or self.random.random() < 0.1
            self.continue_one(self.random.choice(self.groups if unlikely else continuable))
        elif 0.04 < dice < 0.05:
            self.dispatcher.expire(self.now)
            self.collect(StepOutput())
        elif 0.05 < dice < 0.06 and self.has_lossy_workers and self.links:
            self.lose(self.random.choice(list(self.links)))
        elif 0.06 < dice < 0.08 and self.has_lossy_workers and len(self.links) < 3:
            self.join()
        elif dice > 0.75 and len(self.groups) < self.num_requests:
            self.submit()
        elif self.links:
            self.step(self.random.choice(list(self.links)))

    def join(self) -> None:
        self.epoch += self.random.randint(1, 3)
        blocks = max(2, self.pool_tokens // self.block_size)
        capacity = WorkerCapacity(
            block_size=self.block_size,
            num_blocks=blocks,
            host_blocks=self.random.choice([0, 1, 7, blocks, 4 * blocks, 4 * blocks]),
            block_bytes=100 * self.block_size,
            max_slots=self.random.choice([4, 16]),
            max_step_tokens=64,
        )
        rates = TransferRates(*self.random.choice([(0, 0, 0), (10**6, 10**6, 10**4), (10**4, 10**4, 10**6)]))
        worker_id = f"worker-{self.random.randint(1, 3)}"
        if worker_id in self.links:
            self.lose(worker_id)
        self.dispatcher.add_worker(worker_id, capacity, rates, self.epoch, self.now)
        step_ns = (0, 5_000, 50_000)[self.epoch % 3]  # where steps are dear, it pays to wait for beams
        self.links[worker_id] = Link(SimulatedWorker(capacity, self.epoch, step_ns))
        self.collect(StepOutput())

    def lose(self, worker_id: str) -> None:
        link = self.links.pop(worker_id)
        self.note_loads(worker_id)
        self.dispatcher.remove_worker(worker_id, self.now)
        self.dead.append(link)
        self.statistics["lost workers"] += 1
        self.collect(StepOutput())

    def submit(self) -> None:
        dice = self.random
        stem = dice.choice(self.stems)
        if self.groups and dice.random() < 0.3:  # the next turn of a conversation
            said = dice.choice(dice.choice(self.groups).sequences)
            stem = said.token_ids.tolist()
        prompt = stem[: dice.choice([dice.randint(1, 20), 40])] if dice.random() < 0.6 else []
        prompt = prompt + [dice.randrange(60) for _ in range(dice.randint(0 if prompt else 1, 8))]
        faulty = self.has_faulty_requests and dice.random() < 0.3
        deadly = self.has_deadly_requests and dice.random() < 0.2
        beam_width, n = dice.choice([1, 1, 1, 1, 2, 3, 4]), dice.choice([1, 1, 1, 2, 3])
        request = Request(
            request_id=f"request-{len(self.groups)}",
            prompt=array("I", prompt),
            n=(n := min(n, beam_width) if beam_width > 1 else n),
            beam_width=beam_width,
            length_penalty=dice.choice([1.0, 1.0, 0.0, -1.0, 2.0]),
            hold_ns=dice.choice([0, 30, 10**12]) if n == 1 and beam_width <= 1 and self.parking else 0,
            max_tokens=dice.choice([1, 2, 3, 8, 20, 30]),
            min_tokens=dice.choice([0, 0, 2]),
            stop_ids=frozenset(dice.sample(range(64), dice.choice([0, 0, 1, 4]))),
            priority=dice.randint(-1, 1) if self.has_priorities else 0,
            tenant=dice.choice(self.tenants),
            deadline=self.now + dice.randint(1, 300) if dice.random() < 0.05 else None,
            logprobs=dice.choice([None, None, 1]),
            prompt_logprobs=dice.choice([None, None, None, 1]),
            payload=Behaviour(
                seed=dice.randrange(1000),
                nonfinite_at=dice.randint(0, 6) if faulty and dice.random() < 0.5 else None,
                out_of_memory_at=dice.randint(1, 20) if faulty and dice.random() < 0.5 else None,
                deadly_at=dice.randint(1, 30) if deadly else None,
            ),
        )
        answer = self.dispatcher.submit(request, self.now)
        if answer.admission is Admission.OK:
            assert answer.group is not None
            self.groups.append(answer.group)
            for sequence in answer.group.sequences:
                self.streams[sequence] = []
            again = self.dispatcher.submit(request, self.now)
            assert again.admission is Admission.DUPLICATE or answer.group.is_finished
        else:
            self.num_requests -= 1
            self.statistics[answer.admission.value] += 1
        self.collect(StepOutput())

    def stop_one(self) -> None:
        """A gateway finds a stop string, somewhere in what it has been sent."""
        held = [group for group in self.groups if group.keep_until is not None]
        groups = held if held and self.random.random() < 0.3 else self.groups
        sequence = self.random.choice(self.random.choice(groups).sequences)
        keep = self.random.randint(0, len(sequence.output))
        request_id = sequence.request.request_id
        if self.dispatcher.cut(request_id, sequence.index, len(sequence.earlier) + keep, "stop!"):
            self.stopped[sequence] = keep
            self.statistics["cut while held"] += 1
        if self.dispatcher.stop_sequence(request_id, sequence.index, keep, "stop!", self.now):
            self.stopped[sequence] = keep
            self.statistics["stopped by text"] += 1
        self.collect(StepOutput())

    def park_one(self) -> None:
        group = self.random.choice(self.groups)
        was_live = not group.is_finished
        delivered = [len(self.streams[sequence]) for sequence in group.sequences]
        verdict = self.dispatcher.park(group.request.request_id, self.random.choice([0, 15, 10**12]), self.now)
        self.statistics[f"park: {verdict.value}"] += 1
        if verdict is ParkingVerdict.OK:
            assert was_live
            assert group.is_finished
        else:
            refusal = ParkingVerdict.FULL if group.search is None else ParkingVerdict.SEARCHES
            assert verdict is (refusal if was_live else ParkingVerdict.NOT_LIVE)
        self.dispatcher.check_integrity()
        self.collect(StepOutput())
        assert delivered == [len(self.streams[sequence]) for sequence in group.sequences]

    def continue_one(self, group: SequenceGroup) -> None:
        """What a client does after a tool call or some thinking: with new input, with a new limit, or as it was."""
        dice = self.random
        tokens = [dice.randrange(60) for _ in range(dice.choice([0, 0, 1, 3, 9]))]
        what = Continuation(
            tokens=tokens,
            max_tokens=dice.choice([0, 0, 1, 5]),
            max_model_len=dice.choice([10**6, 10**6, 10**6, 20]),
            deadline=self.now + dice.randint(1, 300) if dice.random() < 0.05 else None,
            hold_ns=dice.choice([0, 10**12]) if len(group.sequences) == 1 else 0,
        )
        before = [(s.request, s.output.copy(), s.token_ids[:], s.finish) for s in group.sequences]
        was_cut = group.sequences[0] in self.stopped
        verdict = self.dispatcher.resume(group.request.request_id, what, self.now).verdict
        self.statistics[f"continue: {verdict.value}"] += 1
        if verdict is not ParkingVerdict.OK:
            assert verdict is not ParkingVerdict.UNKNOWN
            self.dispatcher.check_integrity()
            return
        for sequence, (request, output, known, finish) in zip(group.sequences, before, strict=True):
            assert finish is not None
            if finish.reason is FinishReason.PARKED:
                assert self.streams[sequence] == output, "a stream does not end where its request was parked"
            if sequence.turns and sequence.turns[-1].finish is finish:
                self.statistics["turns"] += 1
                self.statistics["turns with KV kept"] += bool(sequence.table.blocks)
                assert sequence.request.prompt == known + array("I", tokens)
                expected, reason = undisturbed_output(request, sequence.index)
                assert output == expected[: len(output)]
                if finish.reason in (FinishReason.STOP, FinishReason.LENGTH) and not was_cut:
                    assert (output, finish.reason) == (expected, reason)
                self.streams[sequence] = []
                self.admitted[group] = 0
                self.stopped.pop(sequence, None)
            if sequence.finish is None:
                self.ends[sequence] = 0
        self.dispatcher.check_integrity()
        self.collect(StepOutput())

    def step(self, worker_id: str) -> None:
        """One of the four things that move a worker on: plan, execute, deliver, or a fault in delivery."""
        link = self.links[worker_id]
        action = self.random.choice(["plan", "execute", "deliver"])
        if action == "plan":
            self.plan(worker_id)
        elif action == "execute" and link.plans:
            self.execute(worker_id, link)
        elif action == "deliver" and link.results:
            if self.has_unruly_results:
                self.deliver_unruly(worker_id, link)
            self.deliver(worker_id, link.results.popleft(), link)

    def execute(self, worker_id: str, link: Link) -> None:
        try:
            plan = link.plans.popleft()
            self.statistics["plans that decode sat out"] += len(plan.decode_remove) > len(plan.decode_add)
            link.results.append(link.worker.execute(plan))
        except WorkerDiedError:
            self.statistics["killed workers"] += 1
            link.plans.clear()
            self.lose(worker_id)

    def plan(self, worker_id: str) -> bool:
        held = self.dispatcher._schedulers[worker_id].held_until
        if held is not None and held <= self.now:
            self.dispatcher.expire(self.now)
        self.idle.difference_update(self.dispatcher.take_woken())
        plan = self.dispatcher.schedule(worker_id, self.now)
        self.dispatcher.check_integrity()
        self.collect(StepOutput())
        if plan is None:
            scheduler = self.dispatcher._schedulers[worker_id]
            may_plan = 0 < len(scheduler.in_flight) < self.config.max_plans_in_flight and scheduler.held_until is None
            if may_plan and (scheduler.decoding or scheduler.moved_beams):
                self.statistics["plans that waited for beams"] += 1
            self.idle.add(worker_id)
            return False
        assert worker_id not in self.idle, f"nobody would have asked {worker_id} for a plan"
        link = self.links[worker_id]
        link.plans.append(plan)
        assert len(link.plans) + len(link.results) <= self.config.max_plans_in_flight
        return True

    def deliver(self, worker_id: str, result: StepResult, link: Link) -> None:
        link.delivered.append(result)
        self.idle.discard(worker_id)
        self.collect(self.dispatcher.apply(worker_id, result, self.now))

    def deliver_unruly(self, worker_id: str, link: Link) -> None:
        """Duplicates, results of dead workers, and results that overtake another."""
        dice = self.random.random()
        if dice < 0.2 and link.delivered:
            self.deliver_stale(worker_id, self.random.choice(link.delivered))
        elif dice < 0.4 and self.dead:
            old = self.random.choice(self.dead)
            try:
                while old.plans:
                    old.results.append(old.worker.execute(old.plans.popleft()))
            except WorkerDiedError:
                old.plans.clear()
            for result in old.results:
                self.deliver_stale(worker_id, result)
        elif dice < 0.6 and len(link.results) > 1:
            overtaking = link.results[1]
            del link.results[1]
            output = self.dispatcher.apply(worker_id, overtaking, self.now)
            assert not output.token_ids
            self.deliver_stale(worker_id, overtaking)
            self.dispatcher.check_integrity()
            link.delivered.append(overtaking)

    def deliver_stale(self, worker_id: str, result: StepResult) -> None:
        output = self.dispatcher.apply(worker_id, result, self.now)
        assert not output.accepted
        assert not output.token_ids
        self.stale_sent += 1

    def drain(self) -> None:
        """No further faults: everything must come to its end, in a bounded number of steps."""
        if not self.links:
            self.join()
        for group in self.groups:
            if group.is_parked:
                self.continue_one(group)
        for _ in range(3000):
            self.now += 1
            if all(group.is_finished for group in self.groups):
                self.let_go_of_everybody()
                return
            moved = False
            for worker_id, link in list(self.links.items()):
                while self.plan(worker_id):
                    moved = True
                while link.plans:
                    self.execute(worker_id, link)
                if worker_id not in self.links:
                    moved = True
                    self.replace_lost_workers()
                elif link.results:
                    moved = True
                    self.deliver(worker_id, link.results.popleft(), link)
                    self.dispatcher.check_integrity()
            stuck = [group for group in self.groups if not group.is_finished]
            assert moved or not stuck, f"nothing moves, but {stuck} are not finished"
        raise AssertionError("the end is not reached in 3000 steps")

    def let_go_of_everybody(self) -> None:
        for group in self.groups:
            self.dispatcher.abort(group.request.request_id, FinishReason.CANCELLED, self.now)
        self.dispatcher.check_integrity()

    def replace_lost_workers(self) -> None:
        if not self.links:
            self.join()

    # ---- what must hold

    def collect(self, output: StepOutput) -> None:
        """What an edge does with a step's output and events."""
        assert len(output.sequences) == len(output.token_ids)
        for sequence, token in zip(output.sequences, output.token_ids, strict=True):
            assert not self.ends[sequence], f"{sequence} got a token after its end"
            self.streams[sequence].append(token)
        for position, entry in output.logprobs.items():
            if not output.sequences[position].request.is_beam_search:
                assert entry == logprob_of(output.token_ids[position])
        for event in self.dispatcher.take_events():
            if isinstance(event, Admitted):
                self.admitted[event.group] += 1
            elif isinstance(event, Finished):
                self.ends[event.sequence] += 1
            else:
                for sequence in event.group.sequences:
                    if sequence.finish is not None and sequence.finish.reason is FinishReason.ERROR:
                        self.ends[sequence] += 1

    def check_end(self) -> None:
        for group in self.groups:
            assert self.dispatcher.find(group.request.request_id) is group
            for sequence in group.sequences:
                if sequence.is_answer:
                    (self.check_answer if group.request.is_beam_search else self.check_sequence)(sequence)
                else:
                    assert sequence.is_finished
                    assert not self.streams[sequence], f"{sequence} is told"
            assert self.admitted[group] <= 1
            if any(sequence.output for sequence in group.sequences):
                assert self.admitted[group] == 1
                if group.request.prompt_logprobs is not None:
                    assert list(group.prompt_logprobs) == [logprob_of(token) for token in group.request.prompt[1:]]
            if group.failure is not None:
                self.check_failure(group)
        loads = self.dispatcher.loads()
        assert loads.stale_results_total == self.stale_sent
        for worker_id in self.links:
            self.note_loads(worker_id)
        for worker in loads.workers:
            assert worker.kv_blocks_used == 0
            assert worker.host_blocks_used == 0
            assert worker.kv_waste_ratio == 0.0
            assert worker.running_sequences == 0 or self.dispatcher.schedule(worker.worker_id, self.now) is None

    def check_sequence(self, sequence: Sequence) -> None:
        expected, reason = undisturbed_output(sequence.request, sequence.index)
        finish, output = sequence.finish, sequence.output
        assert finish is not None
        assert self.ends[sequence] == 1, f"{sequence} ended {self.ends[sequence]} times"
        assert self.streams[sequence][: len(output)] == output
        assert output == expected[: len(output)], f"{sequence} gave {output}, not {expected}"
        assert finish.usage.completion_tokens == len(sequence.earlier) + len(output)
        if sequence in self.stopped and finish.matched_stop:
            assert len(output) == self.stopped[sequence]
        elif finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (output, finish.reason) == (expected, reason)
            assert self.streams[sequence] == output
            assert finish.matched_token_id == (output[-1] if reason is FinishReason.STOP else None)
        if sequence.request.logprobs is not None:
            assert list(sequence.logprobs) == [logprob_of(token) for token in output]
        self.count_end(finish)

    def check_answer(self, sequence: Sequence) -> None:
        """An answer of a beam search: all of it or nothing."""
        finish, output = sequence.finish, sequence.output
        assert finish is not None
        assert self.ends[sequence] == 1, f"{sequence} ended {self.ends[sequence]} times"
        assert self.streams[sequence] == output
        assert finish.usage.completion_tokens == len(output)
        if finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            expected = undisturbed_beams(sequence.request)[0][sequence.index]
            assert output == expected.hypothesis.tokens
            assert sequence.logprobs == expected.hypothesis.logprobs
            assert finish.cumulative_logprob == expected.hypothesis.logprob
            assert finish.matched_token_id == expected.stop_token
            assert (finish.reason is FinishReason.STOP) == (expected.stop_token is not None)
            self.statistics["answers of beam searches"] += 1
            self.statistics["preempted beam searches"] += finish.usage.preemptions > 0
        else:
            assert not output
        self.count_end(finish)

    def count_end(self, finish: Finish) -> None:
        self.statistics[finish.reason.value] += 1
        self.statistics["preemptions"] += finish.usage.preemptions
        assert finish.usage.preemptions <= self.config.max_preemptions
        self.statistics["recomputed tokens"] += finish.usage.recomputed_tokens
        self.statistics["cached tokens"] += finish.usage.cached_tokens

    def check_failure(self, group: SequenceGroup) -> None:
        failed, request = group.failure, group.request
        behaviour = request.payload
        assert isinstance(failed, Failed)
        assert isinstance(behaviour, Behaviour)
        self.statistics[failed.reason] += 1
        if failed.reason == "NONFINITE_LOGITS":
            assert failed.code is StatusCode.INTERNAL
            assert behaviour.nonfinite_at is not None
        elif failed.reason == "OUT_OF_MEMORY":
            assert failed.code is StatusCode.RESOURCE_EXHAUSTED
            assert behaviour.out_of_memory_at is not None
        elif failed.reason == "WORKER_LOST_REPEATEDLY":
            assert failed.code is StatusCode.INTERNAL
            # Nobody but the culprit, unless there are several, or workers were lost for no reason of any request's.
            others = sum(other.request.payload.deadly_at is not None for other in self.groups)  # type: ignore[attr-defined]
            assert behaviour.deadly_at is not None or others > 1 or self.has_lossy_workers
        elif failed.reason == "DEADLINE_UNREACHABLE":
            assert failed.code is StatusCode.DEADLINE_EXCEEDED
            assert request.deadline is not None
            assert not any(sequence.output for sequence in group.sequences)
        else:
            assert failed.reason == "KV_POOL_EXHAUSTED"
            assert failed.code is StatusCode.RESOURCE_EXHAUSTED
            # It must really be too large for the pool, at its largest; +1: an ended sequence may run once more.
            size, shared = self.block_size, len(request.prompt) // self.block_size
            longest = [len(request.prompt) + len(undisturbed_output(request, i)[0]) for i in range(request.n)]
            need = shared + sum(-(-(length + 1) // size) - shared for length in longest)
            slots_short = request.num_sequences > min(self.config.max_num_seqs, self.config.token_budget, 4)
            if request.is_beam_search:
                need = undisturbed_beams(request, size)[1]
            assert need > max(2, self.pool_tokens // size) or slots_short

    def note_loads(self, worker_id: str) -> None:
        worker = next(w for w in self.dispatcher.loads().workers if w.worker_id == worker_id)
        self.statistics["swap preemptions"] += worker.preemptions_total["swap"]
        self.statistics["recompute preemptions"] += worker.preemptions_total["recompute"]
        self.statistics["swapped in bytes"] += worker.swap_in_bytes_total
        self.statistics["tokens found in the arena"] += worker.prefix_cache_host_hit_tokens_total


def run_seeds(seeds: range) -> Counter[str]:
    statistics: Counter[str] = Counter()
    for seed in seeds:
        try:
            statistics += Simulation(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: python -m tests.core.test_simulation {seed}") from error
    return statistics


@pytest.mark.parametrize("part", range(NUM_TESTS))
def test_every_scenario_ends_with_the_one_right_output_and_all_blocks_free(part: int) -> None:
    statistics = run_seeds(range(part * SEEDS_PER_TEST, (part + 1) * SEEDS_PER_TEST))
    for happened in (
        "swap preemptions",
        "recompute preemptions",
        "swapped in bytes",
        "recomputed tokens",
        "cached tokens",
        "stop",
        "length",
        "aborted",
        "stopped by text",
        "answers of beam searches",
        "preempted beam searches",
        "plans that waited for beams",
        "lost workers",
        "NONFINITE_LOGITS",
        "OUT_OF_MEMORY",
        "WORKER_LOST_REPEATEDLY",
        "KV_POOL_EXHAUSTED",
        "never",
        "too late",
        "park: ok",
        "park: full",
        "continue: ok",
        "continue: never",
        "continue: one sequence",
        "continue: context full",
        "cut while held",
        "turns",
        "turns with KV kept",
    ):
        assert statistics[happened] > 0, f"no scenario of {SEEDS_PER_TEST} had {happened}: {statistics}"


def test_so_does_every_scenario_in_which_one_tenant_asks_for_nearly_everything() -> None:
    statistics: Counter[str] = Counter()
    for seed in range(80):
        scenario = Simulation(seed)
        scenario.tenants, scenario.num_requests = ["heavy"] * 8 + ["light"], 24
        statistics += scenario.run()
    assert statistics["plans that decode sat out"] > 20, statistics


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(given, dict(Simulation(int(given)).run()))
