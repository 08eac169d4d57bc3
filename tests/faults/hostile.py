"""A hostile web server on loopback addresses: every way to misbehave that a list of a billion URLs will meet.

`http://127.0.3.<n>:<port>/<case>/<argument>`: the case is a function below, named `answer_<case>`; every host serves
them all. Give each case a host of its own, as the downloader judges hosts by what they do.
"""

import asyncio
import contextlib
import gzip
import io
import socket
import ssl
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import lru_cache
from urllib.parse import unquote

import numpy as np
from PIL import Image

BOMB_BYTES = 64 * 2**20
DRIP_S = 0.1


@lru_cache(maxsize=4_096)
def picture(name: str, size: int = 48) -> bytes:
    """A JPEG that differs for every name."""
    draw = np.random.default_rng(list(name.encode()))
    pixels = Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((size, size))
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def vast_png(side: int = 30_000) -> bytes:
    """A PNG of side x side pixels, 1 bit each, all black: some 110 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 1))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@lru_cache(maxsize=2)
def bomb(encoding: str) -> bytes:
    """BOMB_BYTES of zeros, compressed."""
    return gzip.compress(bytes(BOMB_BYTES), 6) if encoding == "gzip" else zlib.compress(bytes(BOMB_BYTES), 6)


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1")


def whole(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return head(status, f"Content-Length: {len(body)}", *headers) + body


class Line:
    """A connection, as the answers below use it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def drip(self, data: bytes, at_once: int = 1) -> None:
        """A few bytes at a time."""
        for start in range(0, len(data), at_once):
            await self.send(data[start : start + at_once])
            await asyncio.sleep(DRIP_S)

    async def forever(self, data: bytes, pause_s: float = 0.0) -> None:
        while not self._writer.is_closing():
            await self.send(data)
            await asyncio.sleep(pause_s)

    def reset(self) -> None:
        """Close with a RST."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class HostileWeb:
    """The server. `seen` counts requests by (host, path), `heads` are their headers.

    num_asked: how often this path of this host was asked for before.
    """

    def __init__(self) -> None:
        self.port = 0
        self.seen: Counter[tuple[str, str]] = Counter()
        self.connections: Counter[str] = Counter()
        self.heads: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaf: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []

    def url(self, case: str, host: str) -> str:
        return f"http://{host}:{self.port}/{case}"

    def requests(self, host: str) -> int:
        """Requests that a host has had."""
        return sum(number for (name, _), number in self.seen.items() if name == host)

    def listen(self, hosts: list[str], tls: ssl.SSLContext | None = None) -> int:
        """Serve on addresses, all at one free port, which is returned."""

        async def start() -> int:
            port = 0
            for host in hosts:
                server = await asyncio.start_server(self._serve, host, port, backlog=64, ssl=tls)
                port = server.sockets[0].getsockname()[1]
                self._servers.append(server)
            return port

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result(30)

    def listen_garbage(self, host: str) -> int:
        """A port that answers whatever it is told with random bytes, and hangs up. Returns it."""

        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(np.random.default_rng(0).bytes(500))
            writer.close()

        async def start() -> int:
            server = await asyncio.start_server(babble, host, 0)
            self._servers.append(server)
            port: int = server.sockets[0].getsockname()[1]
            return port

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result(30)

    def listen_deaf(self, host: str) -> int:
        """A port where connections are never made: the kernel's queue of them is full. Returns it."""
        listener = socket.create_server((host, 0), backlog=0)
        port: int = listener.getsockname()[1]
        self._deaf.append(listener)
        for _ in range(4):
            caller = socket.socket()
            caller.setblocking(False)
            caller.connect_ex((host, port))
            self._deaf.append(caller)
        return port

    def __enter__(self) -> "HostileWeb":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        async def stop() -> None:
            for server in self._servers:
                server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), self._loop)
        self._thread.join(10)
        self._loop.close()
        for each in self._deaf:
            each.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        host = writer.get_extra_info("sockname")[0]
        self.connections[host] += 1
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                path = unquote(request.split()[1].decode("latin-1")).lstrip("/")
                self.heads.append(request.decode("latin-1"))
                case, _, argument = path.partition("/")
                answer = getattr(self, f"answer_{case}", None)
                num_asked, self.seen[host, path] = self.seen[host, path], self.seen[host, path] + 1
                if answer is None:
                    await Line(writer).send(whole(b"no such thing", status="404 Not Found"))
                elif not await answer(Line(writer), argument, num_asked):
                    break
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass  # the client has hung up
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            self._tasks.discard(task)
            with contextlib.suppress(RuntimeError):
                writer.close()

    # The answers. True keeps the connection.

    async def answer_image(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(picture(argument)))
        return True

    async def answer_status(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(b"an error page" * 20, status=f"{argument} Whatever"))
        return True

    async def answer_flaky(self, line: Line, argument: str, num_asked: int) -> bool:
        """An error the first time, then the picture."""
        if num_asked:
            return await self.answer_image(line, argument, 0)
        return await self.answer_status(line, argument.partition("/")[0], 0)

    async def answer_endless(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(head(argument or "200 OK"))
        await line.forever(bytes(2**16))
        return False

    async def answer_endless_chunks(self, line: Line, argument: str, num_asked: int) -> bool:
        """One byte a chunk: costly for whoever keeps each piece as an object."""
        await line.send(head("200 OK", "Transfer-Encoding: chunked"))
        await line.forever(b"1\r\nx\r\n" * 4_096)
        return False

    async def answer_trickle(self, line: Line, argument: str, num_asked: int) -> bool:
        """Just fast enough for the least speed, for ever."""
        await line.send(head("200 OK"))
        await line.forever(bytes(500), DRIP_S)
        return False

    async def answer_slow_head(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.drip(head("200 OK", "X-Slow: " + "a" * 1_000))
        return False

    async def answer_slow_body(self, line: Line, argument: str, num_asked: int) -> bool:
        body = picture("slow")
        await line.send(head("200 OK", f"Content-Length: {len(body)}"))
        await line.drip(body)
        return False

    async def answer_silence(self, line: Line, argument: str, num_asked: int) -> bool:
        await asyncio.sleep(60)
        return False

    async def answer_says_more(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(head("200 OK", "Content-Length: 100000") + picture("more"))
        return False

    async def answer_says_less(self, line: Line, argument: str, num_asked: int) -> bool:
        body = picture("less", 200)
        await line.send(head("200 OK", f"Content-Length: {len(body) // 2}") + body)
        return False

    async def answer_says_vast(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(head("200 OK", "Content-Length: 99999999999") + picture("vast"))
        return True

    async def answer_bomb(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(bomb(argument), f"Content-Encoding: {argument}"))
        return True

    async def answer_nested(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(gzip.compress(b"x"), "Content-Encoding: " + ", ".join(["gzip"] * 20)))
        return True

    async def answer_vast_png(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(vast_png()))
        return True

    async def answer_html(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(b"<!DOCTYPE html><html><body>gone</body></html>", "Content-Type: image/jpeg"))
        return True

    async def answer_empty(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(b"", "Content-Type: image/jpeg"))
        return True

    async def answer_cut(self, line: Line, argument: str, num_asked: int) -> bool:
        """A whole body that is half a picture."""
        await line.send(whole(picture("cut", 200)[:1_500]))
        return True

    async def answer_loop(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(b"", f"Location: /loop/{int(argument) + 1}", status="302 Found"))
        return True

    async def answer_to(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(whole(b"moved", f"Location: {bytes.fromhex(argument).decode()}", status="302 Found"))
        return True

    async def answer_endless_redirect(self, line: Line, argument: str, num_asked: int) -> bool:
        """A redirect whose body never ends."""
        await line.send(head("302 Found", f"Location: /image/{argument}"))
        await line.forever(bytes(2**16))
        return False

    async def answer_busy(self, line: Line, argument: str, num_asked: int) -> bool:
        """429 with Retry-After, in seconds or as a date so many seconds ahead; then the picture."""
        kind, seconds = argument.split("/")[:2]
        if num_asked:
            await line.send(whole(picture(argument)))
            return True
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=int(seconds)), usegmt=True)
        wait = seconds if kind == "seconds" else date
        await line.send(whole(b"later", f"Retry-After: {wait}", status="429 Too Many Requests"))
        return True

    async def answer_reset(self, line: Line, argument: str, num_asked: int) -> bool:
        """A reset in mid-body: always, or with `once` the first time."""
        body = picture("reset")
        if argument == "once" and num_asked:
            await line.send(whole(body))
            return True
        await line.send(head("200 OK", f"Content-Length: {len(body)}") + body[:100])
        await asyncio.sleep(0.05)
        line.reset()
        return False

    async def answer_raw(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(bytes.fromhex(argument))
        return False

    async def answer_huge_header(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(head("200 OK", "X-Huge: " + "a" * 2**20))
        return False

    async def answer_header_bomb(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(b"HTTP/1.1 200 OK\r\n")
        await line.forever(b"X-Bomb: a\r\n" * 1_000)
        return False

    async def answer_continue(self, line: Line, argument: str, num_asked: int) -> bool:
        """100 Continue for ever."""
        await line.forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        return False

    async def answer_endless_line(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(b"HTTP/1.1 200 OK\r\nX-Line: ")
        await line.forever(b"a" * 2**16)
        return False

    async def answer_opted_out(self, line: Line, argument: str, num_asked: int) -> bool:
        await line.send(head("200 OK", "X-Robots-Tag: noai"))
        await line.forever(bytes(2**16))
        return False


@contextlib.contextmanager
def hostile_web() -> Iterator[HostileWeb]:
    """A running server; `listen` on what you need."""
    with HostileWeb() as web:
        yield web
