"""A scheduler that a test drives by hand: it accepts Join over a real socket and sends the plans it is given."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from pagewire.v1 import worker_pb2, worker_pb2_grpc

LIMIT_S = 60
"""How long a test waits for a message before it fails."""


class Session:
    """One worker's stream."""

    def __init__(self, hello: worker_pb2.WorkerHello, epoch: int) -> None:
        self.hello = hello
        self.epoch = epoch
        self.step = 0
        self.plans: queue.Queue[worker_pb2.JoinResponse | None] = queue.Queue()
        self.results: queue.Queue[worker_pb2.StepResult] = queue.Queue()
        self.heartbeats: queue.Queue[worker_pb2.Heartbeat] = queue.Queue()

    def send(self, plan: worker_pb2.StepPlan) -> None:
        self.plans.put(worker_pb2.JoinResponse(step_plan=plan))

    def plan(self, **fields: Any) -> worker_pb2.StepPlan:
        """Numbers and sends a plan; returns it."""
        self.step += 1
        plan = worker_pb2.StepPlan(epoch=self.epoch, step=self.step, **fields)
        self.send(plan)
        return plan

    def result(self) -> worker_pb2.StepResult:
        return self.results.get(timeout=LIMIT_S)

    def end(self) -> None:
        self.plans.put(None)


class FakeScheduler(worker_pb2_grpc.WorkerServiceServicer):
    """Serves one port. `refusal` refuses every worker with FAILED_PRECONDITION and this text."""

    def __init__(self, address: str = "127.0.0.1:0", first_epoch: int = 1) -> None:
        self.refusal = ""
        self.next_epoch = first_epoch
        self.sessions: queue.Queue[Session] = queue.Queue()
        self.server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(address)}"
        self.server.start()

    def stop(self) -> None:
        self.server.stop(grace=None).wait(LIMIT_S)

    def session(self) -> Session:
        """The next worker that joined."""
        return self.sessions.get(timeout=LIMIT_S)

    def Join(self, request_iterator: Iterator[Any], context: Any) -> Iterator[worker_pb2.JoinResponse]:  # noqa: N802
        hello = next(request_iterator)
        assert hello.WhichOneof("message") == "hello"
        if self.refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        session = Session(hello.hello, self.next_epoch)
        self.next_epoch += 1
        self.sessions.put(session)
        yield worker_pb2.JoinResponse(
            welcome=worker_pb2.WorkerWelcome(
                epoch=session.epoch, max_plans_in_flight=2, heartbeat_interval_ns=20_000_000
            )
        )

        def read() -> None:
            try:
                for message in request_iterator:
                    if message.WhichOneof("message") == "step_result":
                        session.results.put(message.step_result)
                    else:
                        session.heartbeats.put(message.heartbeat)
            except grpc.RpcError:
                pass  # the worker has gone
            session.plans.put(None)

        reader = futures.ThreadPoolExecutor(1)
        reader.submit(read)
        while (response := session.plans.get()) is not None:
            yield response
        reader.shutdown(wait=False)
