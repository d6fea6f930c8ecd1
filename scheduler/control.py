"""ControlService: what operators ask. The gateway passes their calls on to here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from pagewire import __version__
from pagewire.v1 import control_pb2
from scheduler.block_watch import BlockWatch
from scheduler.duplex import answer, parse
from scheduler.engine import Engine
from scheduler.worker_link import PROTOCOL_VERSION


class ControlServicer:
    """Serves GetServerInfo, GetLoads, ListWorkers, Drain, PinPrefix, RecordPlans and WatchBlocks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watch = BlockWatch(engine)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service for `server.add_generic_rpc_handlers`; messages stay bytes."""
        calls: dict[str, Callable[[bytes], bytes]] = {
            "GetServerInfo": self._get_server_info,
            "GetLoads": self._get_loads,
            "ListWorkers": self._list_workers,
            "Drain": self._drain,
            "PinPrefix": self._pin_prefix,
        }
        methods = {name: grpc.unary_unary_rpc_method_handler(_answering(call)) for name, call in calls.items()}
        methods["RecordPlans"] = grpc.unary_unary_rpc_method_handler(self._record_plans)
        methods["WatchBlocks"] = grpc.unary_stream_rpc_method_handler(self._watch_blocks)
        return grpc.method_handlers_generic_handler("pagewire.v1.ControlService", methods)

    def _get_server_info(self, raw: bytes) -> bytes:
        parse(control_pb2.GetServerInfoRequest, raw)
        engine = self._engine
        return control_pb2.GetServerInfoResponse(
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            model=engine.model,
            settings=engine.settings_as_text(),
            uptime_ns=engine.clock() - engine.started_at,
        ).SerializeToString()

    def _get_loads(self, raw: bytes) -> bytes:
        request = parse(control_pb2.GetLoadsRequest, raw)
        return self._engine.loads(request.max_requests).SerializeToString()

    def _list_workers(self, raw: bytes) -> bytes:
        parse(control_pb2.ListWorkersRequest, raw)
        now = self._engine.clock()
        response = control_pb2.ListWorkersResponse()
        for link in self._engine.workers.values():
            response.workers.add(
                hello=link.hello,
                epoch=link.epoch,
                last_step=link.last_step,
                since_heartbeat_ns=max(0, now - link.heard_at),
                stalled=link.stalled,
            )
        return response.SerializeToString()

    def _drain(self, raw: bytes) -> bytes:
        request = parse(control_pb2.DrainRequest, raw)
        live = self._engine.drain(resume=request.resume)
        return control_pb2.DrainResponse(live_requests=live).SerializeToString()

    async def _record_plans(self, raw: bytes, context: Any) -> bytes | None:
        async def run() -> bytes:
            request = parse(control_pb2.RecordPlansRequest, raw)
            if request.stop:
                recorder = self._engine.end_recording()
                await asyncio.to_thread(recorder.stop)
            else:
                recorder = self._engine.start_recording(request.name)
            return control_pb2.RecordPlansResponse(
                file=str(recorder.path),
                recording=recorder.is_recording,
                whole=recorder.is_whole,
                events=recorder.num_events,
                bytes=recorder.num_bytes,
            ).SerializeToString()

        return await answer(context, run())

    async def _watch_blocks(self, raw: bytes, context: Any) -> None:
        async def watch() -> None:
            await self._watch.serve(parse(control_pb2.WatchBlocksRequest, raw), context)

        await answer(context, watch())

    def _pin_prefix(self, raw: bytes) -> bytes:
        return self._engine.pin_prefix(parse(control_pb2.PinPrefixRequest, raw)).SerializeToString()


def _answering(call: Callable[[bytes], bytes]) -> Callable[[bytes, Any], Awaitable[bytes | None]]:
    """A unary handler that turns what `call` raises into a status."""

    async def handle(raw: bytes, context: Any) -> bytes | None:
        async def run() -> bytes:
            return call(raw)

        return await answer(context, run())

    return handle
