"""Messages of two parts, a few words (JSON) and an image's bytes, between two processes that take turns."""

import socket
import struct

HEADER = struct.Struct("<II")
READ_BYTES = 2**16
"""More than most replies have: they arrive in one call, and every call hands the GIL around."""


def send(peer: socket.socket, words: bytes, data: bytes) -> None:
    """Write a message. Raises OSError when nobody is there to read it."""
    parts = [HEADER.pack(len(words), len(data)), words, data]
    num_sent = peer.sendmsg(parts)
    if num_sent < sum(map(len, parts)):
        peer.sendall(memoryview(b"".join(parts))[num_sent:])


def receive(peer: socket.socket) -> tuple[bytes, bytes]:
    """Read a message. Raises EOFError or OSError when the other side is gone or takes longer than the socket waits."""
    head = peer.recv(READ_BYTES)
    while len(head) < HEADER.size:
        head += _some(peer, HEADER.size - len(head))
    num_words, num_bytes = HEADER.unpack_from(head)
    size, num_read = HEADER.size + num_words + num_bytes, len(head)
    parts = [head]
    while num_read < size:
        parts.append(_some(peer, size - num_read))
        num_read += len(parts[-1])
    message = b"".join(parts)
    return message[HEADER.size : HEADER.size + num_words], message[HEADER.size + num_words :]


def _some(peer: socket.socket, size: int) -> bytes:
    part = peer.recv(size)
    if not part:
        raise EOFError
    return part
