"""Messages of two parts, a few words (JSON) and an image's bytes, through a pipe."""

import os
import struct
from io import FileIO

HEADER = struct.Struct("<II")
READ_BYTES = 2**20


def send(pipe: FileIO, words: bytes, data: bytes) -> None:
    """Write a message. Raises BrokenPipeError when nobody is there to read it."""
    parts = [HEADER.pack(len(words), len(data)), words, data]
    num_written = os.writev(pipe.fileno(), parts)
    if num_written < sum(map(len, parts)):  # more than the pipe holds
        rest = memoryview(b"".join(parts))[num_written:]
        while rest:
            rest = rest[pipe.write(rest) or 0 :]


def receive(pipe: FileIO) -> tuple[bytes, bytes]:
    """Read a message. Raises EOFError when the other side is gone."""
    num_words, num_bytes = HEADER.unpack(_read(pipe, HEADER.size))
    return _read(pipe, num_words), _read(pipe, num_bytes)


def _read(pipe: FileIO, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        part = pipe.read(min(size, READ_BYTES))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
