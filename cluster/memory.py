"""How a process deals with memory that it has freed."""

import contextlib
import ctypes
from functools import cache

MAX_KEPT_BYTES = 32 * 2**20
"""Larger blocks glibc gives back to the kernel when they are freed."""
_KEPT_BYTES = 512 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@cache
def keep_freed_memory() -> None:
    """Have arrays of up to 512 MiB made of memory that this process has freed, and keep as much for the next ones.

    For tasks whose arrays are larger than `MAX_KEPT_BYTES`: the kernel hands out new memory page by page and cleared,
    and for arrays that are read or written once that takes longer than the work (adr/0011). C libraries that do not
    know or do not allow it are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES):
            library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
