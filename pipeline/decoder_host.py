"""The host of the decoding processes: `python -m pipeline.decoder_host SETTINGS MEMORY SOCKET [SOCKET ...]`.

SETTINGS is an ImageConfig as JSON; the others are numbers of open files: memory to share (pipeline.messages) and
sockets, one for each child. The host imports the
decoders, forks the children and waits. A child reads a body, decodes it and replies, one after the other, until its
socket is closed; it has a limit of memory, and one of processor time for each image. When a child dies while it
decodes, the host replies in its place and forks another. When one dies at any other moment, the host ends and all with
it: whoever waits at a socket sees its end, and what was being handed over can be asked again.
"""

import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from pipeline.images import process
from pipeline.messages import receive, send
from pipeline.picture import ImageError
from pipeline.reasons import Reason

if TYPE_CHECKING:  # it imports far more than a decoding process needs
    from pipeline.config import ImageConfig

IDLE, DECODING = 0, 1
BYTES_PER_PIXEL = 16
"""Memory that the largest image allowed may need: pixels as decoded, with transparency, as 8-bit colours, resized."""
SPARE_BYTES = 256 * 2**20
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """0 when all sockets were closed, 1 when a child died while it was not decoding."""
    config = cast("ImageConfig", SimpleNamespace(**json.loads(arguments[0])))
    memory = mmap.mmap(int(arguments[1]), 0)
    askers = [socket.socket(fileno=int(argument)) for argument in arguments[2:]]
    states = mmap.mmap(-1, len(askers))  # shared with the children
    if config.exif:
        import pipeline.exif  # noqa: F401  loaded before the children are forked
    gc.freeze()
    slot_of = {_fork(slot, askers, memory, states, config): slot for slot in range(len(askers))}
    os.write(1, b"ready\n")
    while slot_of:
        pid, status = os.wait()
        slot = slot_of.pop(pid)
        if status == 0:
            continue
        if states[slot] != DECODING:
            return 1
        states[slot] = IDLE
        refusal = {"reason": Reason.DECODER_CRASHED.value, "detail": _cause(status)}
        send(askers[slot], memory, 0, json.dumps(refusal).encode(), b"")
        slot_of[_fork(slot, askers, memory, states, config)] = slot
    return 0


def serve(asker: socket.socket, memory: mmap.mmap, states: mmap.mmap, slot: int, config: "ImageConfig") -> None:
    """Decode what comes until the other side is gone."""
    allowed_at = -1
    while True:
        try:
            shelf, boxes, body = receive(asker, memory)
        except (EOFError, OSError):
            return
        allowed_at = _allow_seconds(config.decode_timeout_s, allowed_at)
        states[slot] = DECODING
        try:
            processed = process(body, config, json.loads(boxes))
            told, data = {name: value for name, value in vars(processed).items() if name != "data"}, processed.data
        except ImageError as refusal:
            told, data = {"reason": refusal.reason.value, "detail": refusal.detail}, b""
        states[slot] = IDLE
        try:
            send(asker, memory, shelf, json.dumps(told).encode(), data)
        except OSError:
            return


def _fork(
    slot: int, askers: Sequence[socket.socket], memory: mmap.mmap, states: mmap.mmap, config: "ImageConfig"
) -> int:
    host = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)  # libraries complain there of every damaged file
        _limit_memory(config.max_pixels * BYTES_PER_PIXEL + SPARE_BYTES)
        if os.getppid() == host:
            serve(askers[slot], memory, states, slot, config)
            status = 0
    finally:
        os._exit(status)


def _limit_memory(size_bytes: int) -> None:
    """Let this process take so much more than it has. A decoder that wants more fails."""
    with open("/proc/self/statm") as file:
        has = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _at_most(has + size_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow_seconds(seconds: int, allowed_at: int = -1) -> int:
    """Have the system end this process (SIGXCPU) after so much more of processor time, in whole seconds.

    Returns those used up; if they are `allowed_at`, the limit is there already.
    """
    used = int(time.process_time())
    if used != allowed_at:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (_at_most(used + 1 + seconds, most), most))
    return used


def _at_most(wanted: int, most: int) -> int:
    """A limit that whoever started us (a batch system, ulimit) lets us set."""
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most)


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "took too long" if number == signal.SIGXCPU else f"{signal.Signals(number).name} in the decoder"
    return f"the decoder ended the process with status {os.WEXITSTATUS(status)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
