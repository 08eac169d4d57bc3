"""How a process deals with memory that it has freed."""

import contextlib
import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 2**30


@cache
def keep_freed_memory() -> None:
    """Have arrays of up to 1 GiB made of memory that this process has freed, for tasks that work on arrays alone.

    glibc gives each block of more than 32 MiB back at once, and the kernel hands out such memory page by page and
    cleared: for arrays that are read or written once that takes longer than the work (adr/0011). Other C libraries
    are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
