"""Ctrl-C and SIGTERM: both end a command as KeyboardInterrupt, and neither is ever lost.

An exception that a signal handler raises inside a C library's callback is printed and forgotten there. So the signal
is remembered as well, and `raise_if_interrupted` is asked between pieces of work.
"""

import signal
import threading
from types import FrameType

_told_to_stop = threading.Event()


def catch_interrupts() -> None:
    """Make SIGTERM (a job being stopped) end a command the way Ctrl-C does. An ignored SIGINT stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _told_to_stop.set()
        raise KeyboardInterrupt

    _told_to_stop.clear()
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal came since `catch_interrupts`."""
    if _told_to_stop.is_set():
        raise KeyboardInterrupt
