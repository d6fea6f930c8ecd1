"""Asks the control service again and again, on a thread of its own, and says so when it is gone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType

import grpc

from pagewire import errors
from pagewire.runtime.channel import client_options
from pagewire.runtime.rich_status import decode
from pagewire.terminal.figures import Answers, Frame, frame
from pagewire.v1 import control_pb2, control_pb2_grpc

ANSWER_LIMIT_S = 3.0
MAX_REQUESTS = 500
"""More than any screen has lines; sorting is over what is listed."""


def ask(stub: control_pb2_grpc.ControlServiceStub, address: str) -> Answers:
    """One look at the service at `address`. Raises StatusError."""
    try:
        return Answers(
            stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=ANSWER_LIMIT_S),
            stub.GetLoads(control_pb2.GetLoadsRequest(max_requests=MAX_REQUESTS), timeout=ANSWER_LIMIT_S),
            stub.ListWorkers(control_pb2.ListWorkersRequest(), timeout=ANSWER_LIMIT_S),
        )
    except grpc.RpcError as error:
        details = decode(error)
    if details.code is grpc.StatusCode.UNAVAILABLE and not details.reason:
        details = replace(details, message=f"no server at {address}")  # gRPC's own words name system calls
    elif details.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = replace(details, message=f"the server at {address} does not answer")
    raise errors.from_details(details)


def look_once(address: str, interval_s: float) -> Frame:
    """Two looks with some time between them, so that the frame has rates. Raises StatusError."""
    with grpc.insecure_channel(address, options=client_options(internal=False)) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        before = ask(stub, address)
        time.sleep(interval_s)
        return frame(ask(stub, address), before)


@dataclass(frozen=True)
class News:
    """What the last look brought."""

    frame: Frame | None = None
    """None: the service cannot be reached, for `error`."""
    error: errors.StatusError | None = None


class Watcher:
    """Looks every `interval_s` seconds. Whoever waits on `wake` (readable) then finds what is new in `take`."""

    def __init__(self, address: str, interval_s: float) -> None:
        self._address = address
        self._interval_s = interval_s
        self._news: News | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._channel: grpc.Channel | None = None
        self.wake, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        os.set_blocking(self.wake, False)
        # A call that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        with self._lock:
            if self._channel is not None:
                self._channel.close()
        self._thread.join(ANSWER_LIMIT_S)
        if not self._thread.is_alive():
            os.close(self.wake)
            os.close(self._writing)

    def nudge(self) -> None:
        """Makes `wake` readable. Safe in a signal handler."""
        with contextlib.suppress(BlockingIOError):  # full: it is readable already
            os.write(self._writing, b"\0")

    def take(self) -> News | None:
        """What came since the last call; None: nothing."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake, 4096)
        with self._lock:
            news, self._news = self._news, None
        return news

    def _run(self) -> None:
        before: Answers | None = None
        stub: control_pb2_grpc.ControlServiceStub | None = None
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                if stub is None:
                    stub = self._connect()
                    if stub is None:
                        return
                now = ask(stub, self._address)
                news, before = News(frame(now, before)), now
            except (errors.StatusError, ValueError) as error:
                if isinstance(error, ValueError):  # the channel was closed under the call
                    return
                news, before, stub = News(error=error), None, None
            with self._lock:
                self._news = news
            self.nudge()
            self._stop.wait(max(0.0, self._interval_s - (time.monotonic() - begun)))

    def _connect(self) -> control_pb2_grpc.ControlServiceStub | None:
        """A new channel: an old one would wait longer and longer between its attempts. None: it is over."""
        with self._lock:
            if self._stop.is_set():
                return None
            if self._channel is not None:
                self._channel.close()
            self._channel = grpc.insecure_channel(self._address, options=client_options(internal=False))
            return control_pb2_grpc.ControlServiceStub(self._channel)
