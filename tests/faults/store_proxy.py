"""A proxy in front of an S3 server that does to requests what networks and busy stores do, by chance from a seed."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 64 * 2**10
DELAY_S = (0.1, 1.5)
STORM_S = 4.0
DRAIN_S = 10.0

FAULTS = {
    "internal_error": 0.015,  # 500, nothing was done
    "slow_down": 0.015,  # 503 SlowDown, nothing was done
    "delay": 0.04,
    "reset": 0.01,  # before anything was done
    "cut_request": 0.01,  # the server gets half of the body
    "cut_answer": 0.01,  # done, and the client gets half of the answer
    "lost_answer": 0.01,  # done, and the client is not told
    "storm": 0.001,  # STORM_S in which every request is told to slow down: longer than clients try by themselves
}
"""Chance of each per request."""


class _ResetError(Exception):
    """Hang up on the client with a RST."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """A request or an answer."""

    head: bytes
    body: bytes

    @property
    def is_for_head(self) -> bool:
        """Whether it asks for an answer without its body."""
        return self.head.startswith(b"HEAD ")

    @property
    def half(self) -> bytes:
        """All of the head and half of the body; half of the head where there is no body."""
        return self.head + self.body[: len(self.body) // 2] if self.body else self.head[: len(self.head) // 2]


class StoreProxy:
    """Listens on 127.0.0.1 and passes requests on to `server_url`; `injected` counts what it did to them.

    Hosts and signatures stay as the client made them. calm: no faults for now.
    """

    def __init__(self, server_url: str, seed: int, faults: dict[str, float] | None = None) -> None:
        self.injected: Counter[str] = Counter()
        self.num_requests = 0
        self.calm = False
        self._server = (urlsplit(server_url).hostname or "127.0.0.1", urlsplit(server_url).port or 80)
        self._faults = FAULTS if faults is None else faults
        self._draw = random.Random(seed)
        self._storm_until = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="store-proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    def __enter__(self) -> "StoreProxy":
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self.url = f"http://127.0.0.1:{listening.result(10)}"
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()

    async def _listen(self) -> int:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MAX_HEAD_BYTES, backlog=256)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._loop.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                request = await _read(reader, writer)
                fault = self._fault()
                answer = await self._answer(request, fault)
                writer.write(answer)
                await asyncio.wait_for(writer.drain(), DRAIN_S)
                if fault == "cut_answer":
                    raise _ResetError
        except (_ResetError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            _reset(writer)  # a fault, or either side has hung up
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            self._tasks.discard(task)

    def _fault(self) -> str:
        """What to do to the next request; "" is nothing."""
        self.num_requests += 1
        if self.calm:
            return ""
        if time.monotonic() < self._storm_until:
            return "slow_down"
        name = self._draw.choices(["", *self._faults], [1 - sum(self._faults.values()), *self._faults.values()])[0]
        if name == "storm":
            self._storm_until = time.monotonic() + STORM_S
        return name

    async def _answer(self, request: Message, fault: str) -> bytes:
        """What the client is sent. Raises _ResetError where it is hung up on."""
        if fault == "cut_request" and not request.body:
            fault = "reset"
        if fault:
            self.injected[fault] += 1
        if fault == "internal_error":
            return _refusal(request, "500 Internal Server Error", "InternalError")
        if fault in ("slow_down", "storm"):
            return _refusal(request, "503 Slow Down", "SlowDown")
        if fault == "reset":
            raise _ResetError
        if fault == "delay":
            await asyncio.sleep(self._draw.uniform(*DELAY_S))
        reader, writer = await asyncio.open_connection(*self._server, limit=MAX_HEAD_BYTES)
        try:
            if fault == "cut_request":
                writer.write(request.half)
                await writer.drain()
                raise _ResetError
            writer.write(request.head + request.body)
            await writer.drain()
            answer = await _read(reader, has_body=not request.is_for_head)
        finally:
            _reset(writer)
        if fault == "lost_answer":
            raise _ResetError
        return answer.half if fault == "cut_answer" else answer.head + answer.body


async def _read(
    reader: asyncio.StreamReader, client: asyncio.StreamWriter | None = None, *, has_body: bool = True
) -> Message:
    """A whole message. client: told to go on where it asks before it sends a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head[:-4].split(b"\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    if client is None and lines[0].split()[1] == b"100":
        return await _read(reader, has_body=has_body)
    if client is not None and fields.get(b"expect", b"").lower() == b"100-continue":
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join([line for line in lines if not line.lower().startswith(b"expect:")]) + b"\r\n\r\n"
    if not has_body or lines[0].split()[1] in (b"204", b"304"):
        return Message(head=head, body=b"")
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        return Message(head=head, body=await _read_chunks(reader))
    return Message(head=head, body=await reader.readexactly(int(fields.get(b"content-length", b"0"))))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body as it came over the network, trailers included."""
    pieces = []
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        pieces += [line, await reader.readexactly(size + 2)] if size else [line]
        if not size:
            while pieces[-1] != b"\r\n":
                pieces.append(await reader.readuntil(b"\r\n"))
            return b"".join(pieces)


def _refusal(request: Message, status: str, code: str) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if request.is_for_head else body)


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
