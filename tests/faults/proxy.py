"""A proxy that spoils each request the first time that it sees it, and lets the repetition pass."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["cut before", "cut after", "truncate", "duplicate", "delay"]
FAULTS: tuple[Fault, ...] = ("cut before", "cut after", "truncate", "duplicate", "delay")
DELAY_SECONDS = 0.2


class Proxy:
    """Whole requests and answers over HTTP/1.1, one connection to the server for each."""

    def __init__(self, server: str, fault: Fault) -> None:
        address = urlsplit(server)
        self._host, self._port = address.hostname, address.port
        self._fault = fault
        self._seen: set[bytes] = set()
        self.spoiled = 0
        self.url = ""

    async def serve(self, started: threading.Event, ending: asyncio.Event) -> None:
        """Until `ending`."""
        listening = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        started.set()
        async with listening:
            await ending.wait()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection ends with it."""
        request = await _message(reader)
        fault = self._fault if self._is_new(request) else None
        if fault is not None:
            self.spoiled += 1
        if fault == "cut before":
            return False
        if fault == "duplicate":
            await asyncio.gather(self._forward(request), self._forward(request))
        if fault == "delay":
            await asyncio.sleep(DELAY_SECONDS)
        answer = await self._forward(request)
        if fault == "cut after":
            return False
        writer.write(answer[: len(answer) // 2] if fault == "truncate" else answer)
        await writer.drain()
        return fault != "truncate"

    def _is_new(self, request: bytes) -> bool:
        digest = hashlib.sha256(request).digest()
        # A heartbeat is sent once and not repeated: nothing is wrong if one is lost.
        new = digest not in self._seen and b"session_heartbeat" not in request.split(b"\r\n", 1)[0]
        self._seen.add(digest)
        return new

    async def _forward(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            await writer.drain()
            return await _message(reader)
        finally:
            writer.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
    if fields.get(b"transfer-encoding") == b"chunked":
        return head + await _chunks(reader)
    return head + await reader.readexactly(int(fields.get(b"content-length", 0)))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size, 16) + 2)
        body += size + chunk
        if int(size, 16) == 0:
            return body


@contextmanager
def spoiling(server: str, fault: Fault) -> Iterator[Proxy]:
    """A proxy in a thread of its own."""
    proxy, started = Proxy(server, fault), threading.Event()
    loop, ending = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(proxy.serve(started, ending),))
    thread.start()
    started.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
