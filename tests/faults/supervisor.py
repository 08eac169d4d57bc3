"""A command that leaves nothing behind: no process and no folder, however it ends.

`supervised(work, limit_s)` runs `work(folder)` in a child and stays its watcher. The watcher adopts every process that
loses its parent (PR_SET_CHILD_SUBREAPER), reaps the dead, ends all of them when the child ends, is killed, or takes too
long, and removes the folder. Is the watcher itself killed, the child is told to end (PR_SET_PDEATHSIG) and cleans up.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TIMED_OUT = 124
GRACE_S, ENDING_S, POLL_S = 30.0, 20.0, 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervised(work: Callable[[Path], int], limit_s: float) -> int:
    """The exit status of `work`, which is given an empty folder with a short path (sockets need one).

    124 where it took longer than limit_s. It is interrupted (KeyboardInterrupt) first, and killed after GRACE_S more.
    """
    folder = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    watcher, child = os.getpid(), 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    saved = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            os._exit(_child(work, folder, watcher))
        return _watch(child, limit_s)
    finally:
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in saved.items():
            signal.signal(number, handler)
        _prctl(PR_SET_CHILD_SUBREAPER, 0)


def end_descendants() -> list[str]:
    """Kill whatever still runs below this process, and wait for it; returns the command lines."""
    ended, deadline = [], time.monotonic() + ENDING_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    ended.append(" ".join(process.cmdline())[:200])
                    process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL_S)
    return ended


def _child(work: Callable[[Path], int], folder: Path, watcher: int) -> int:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    status = 1
    try:
        os.setsid()  # Ctrl-C reaches the watcher alone, which passes it on
        for number in SIGNALS:
            signal.signal(number, interrupt)
        if os.getppid() != watcher:
            return status
        status = work(folder)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:  # it is said, whatever it is
        traceback.print_exc()
    finally:
        if os.getppid() != watcher:  # nobody else is left to do it
            end_descendants()
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _watch(child: int, limit_s: float) -> int:
    """Reap whatever ends, until the child has."""
    deadline, is_late = time.monotonic() + limit_s, False
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return TIMED_OUT if is_late else code if code >= 0 else 128 - code
        if time.monotonic() > deadline:
            print(f"still at work after {limit_s:.0f} s: stopping it", file=sys.stderr, flush=True)
            os.kill(child, signal.SIGKILL if is_late else signal.SIGTERM)
            deadline, is_late = time.monotonic() + GRACE_S, True
        if not pid:
            time.sleep(POLL_S)


def _prctl(option: int, value: int) -> None:
    """Linux alone has these; elsewhere only what the child ends by itself is ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
