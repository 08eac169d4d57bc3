"""Messages of two parts, a few words (JSON) and an image's bytes, between a process and its decoding processes.

Words go through a stream socket, and so do data of more than SHELF_BYTES. All other data lie on a *shelf*, a piece of
memory that both sides share: each message names one, which is left alone until the reply has been taken. A copy into
it and one out of it take a third of what the system needs to carry the same bytes through a socket.
"""

import mmap
import socket
import struct
from collections import deque
from collections.abc import Iterator

SHELF_BYTES = 2**20
HEADER = struct.Struct("<III")
"""Sizes of the words and of the data, number of the shelf."""
READ_BYTES = 2**16


def send(peer: socket.socket, memory: mmap.mmap, shelf: int, words: bytes, data: bytes) -> None:
    """Write a message, however long that takes. Raises OSError when nobody is there to read it."""
    peer.sendall(b"".join(_parts(memory, shelf, words, data)))


def receive(peer: socket.socket, memory: mmap.mmap) -> tuple[int, bytes, bytes]:
    """Wait for a message: its shelf, words and data; nothing is read of the next one.

    Raises EOFError or OSError when nobody sends.
    """
    num_words, num_bytes, shelf = HEADER.unpack(_exactly(peer, HEADER.size))
    words = _exactly(peer, num_words)
    if num_bytes > SHELF_BYTES:
        return shelf, words, _exactly(peer, num_bytes)
    return shelf, words, _on_shelf(memory, shelf, num_bytes)


def _parts(memory: mmap.mmap, shelf: int, words: bytes, data: bytes) -> list[bytes]:
    """What goes through the socket."""
    header = HEADER.pack(len(words), len(data), shelf)
    if len(data) > SHELF_BYTES:
        return [header, words, data]
    at = shelf * SHELF_BYTES
    memory[at : at + len(data)] = data
    return [header, words]


def _on_shelf(memory: mmap.mmap, shelf: int, size: int) -> bytes:
    return memory[shelf * SHELF_BYTES : shelf * SHELF_BYTES + size]


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = peer.recv(size, socket.MSG_WAITALL) if size else b""
    while len(data) < size:  # a signal has come in between, or the end
        part = peer.recv(size - len(data), socket.MSG_WAITALL)
        if not part:
            raise EOFError
        data += part
    return data


class Outbox:
    """Messages on their way into a socket that does not block."""

    def __init__(self, peer: socket.socket, memory: mmap.mmap) -> None:
        self._peer, self._memory = peer, memory
        self._unsent: deque[memoryview] = deque()

    def __bool__(self) -> bool:
        """Whether something is left to be written, by `flush`, when there is room."""
        return bool(self._unsent)

    def put(self, shelf: int, words: bytes, data: bytes) -> None:
        """Write what there is room for. Raises OSError when nobody is there to read it."""
        parts = _parts(self._memory, shelf, words, data)
        self._unsent.append(memoryview(b"".join(parts[:2])))
        self._unsent.extend(map(memoryview, parts[2:]))
        self.flush()

    def flush(self) -> None:
        """Write more. Raises OSError when nobody is there to read it."""
        while self._unsent:
            part = self._unsent.popleft()
            try:
                num_sent = self._peer.send(part)
            except BlockingIOError:
                num_sent = 0
            if num_sent < len(part):
                self._unsent.appendleft(part[num_sent:])
                return


class Inbox:
    """Messages as they come out of a socket that does not block."""

    def __init__(self, peer: socket.socket, memory: mmap.mmap) -> None:
        self._peer, self._memory = peer, memory
        self._begun = bytearray()
        self.is_closed = False
        """The other side is gone."""

    def take(self) -> Iterator[tuple[bytes, bytes]]:
        """Words and data of the messages that are there as a whole."""
        try:
            while data := self._peer.recv(READ_BYTES):
                self._begun += data
                if len(data) < READ_BYTES:
                    break
            else:
                self.is_closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True
        while (message := self._next()) is not None:
            yield message

    def _next(self) -> tuple[bytes, bytes] | None:
        if len(self._begun) < HEADER.size:
            return None
        num_words, num_bytes, shelf = HEADER.unpack_from(self._begun)
        is_sent = num_bytes > SHELF_BYTES
        end_of_words = HEADER.size + num_words
        end = end_of_words + num_bytes * is_sent
        if len(self._begun) < end:
            return None
        words, data = bytes(self._begun[HEADER.size : end_of_words]), bytes(self._begun[end_of_words:end])
        del self._begun[:end]
        return words, data if is_sent else _on_shelf(self._memory, shelf, num_bytes)
