"""A plain HTTP client over a socket: what goes over the wire, and nothing that a library would add or hide."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tests.gateway.fake_scheduler import LIMIT_S

BODY_END = b"\r\n\r\n"


@dataclass
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])

    @property
    def events(self) -> list[Any]:
        """The stream's events; `[DONE]` stays text."""
        datas = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]
        return [data.decode() if data == b"[DONE]" else json.loads(data) for data in datas]


class Connection:
    """One connection, one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def status(self) -> tuple[int, dict[str, str]]:
        """Reads the head of the answer."""
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readuntil(BODY_END)
        line, *rest = head.decode().rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (entry.partition(":") for entry in rest)}
        return int(line.split()[1]), headers

    async def chunk(self) -> bytes:
        """The next chunk of a body in chunked encoding; empty at its end."""
        async with asyncio.timeout(LIMIT_S):
            size = int(await self.reader.readline(), 16)
            return (await self.reader.readexactly(size + 2))[:size]

    async def reply(self) -> Reply:
        """Reads the whole answer."""
        status, headers = await self.status()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while data := await self.chunk():
                body += data
        else:
            async with asyncio.timeout(LIMIT_S):
                body = await self.reader.readexactly(int(headers["content-length"]))
        return Reply(status, headers, body)

    async def close(self) -> None:
        """Closes the socket, whatever is still to come."""
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


async def connect(address: str) -> Connection:
    """An open connection."""
    host, _, port = address.rpartition(":")
    return Connection(*await asyncio.open_connection(host, int(port)))


async def send(address: str, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> Connection:
    """Sends a request; `body` is JSON unless it is bytes. Header names have _ for -."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(data)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    connection = await connect(address)
    connection.writer.write("\r\n".join(lines).encode() + BODY_END + data)
    await connection.writer.drain()
    return connection


async def ask(address: str, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> Reply:
    """A request and its whole answer."""
    connection = await send(address, path, body, method=method, **headers)
    try:
        return await connection.reply()
    finally:
        await connection.close()
