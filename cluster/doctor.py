"""`pairmill doctor`: is this machine fit to run pairmill, and if not, what to do."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from cluster.errors import EXIT_DONE, EXIT_FAILED, RequestError

LOW_DISK_BYTES = 10 * 1024**3
LOW_OPEN_FILES = 4096
Check = tuple[str, bool, str]


def doctor_command(words: Sequence[str]) -> int:
    """Print a table of checks; exit status 1 when one of them would stop a run."""
    if words in (["--help"], ["-h"]):
        print("usage: pairmill doctor")
        return EXIT_DONE
    if words:
        raise RequestError(f"{words[0]}: not understood; pairmill doctor takes no settings")
    table = Table("check", "", "found")
    good = True
    for name, passed, found in [*_packages(), *_machine()]:
        table.add_row(name, "ok" if passed else "PROBLEM", found)
        good &= passed
    Console().print(table)
    return EXIT_DONE if good else EXIT_FAILED


def _packages() -> Iterator[Check]:
    """Every plain dependency of this distribution, installed and in range."""
    for line in requires("pairmill") or []:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            yield need.name, False, f"not installed; pip install '{line}'"
            continue
        fits = need.specifier.contains(found, prereleases=True)
        yield need.name, fits, found if fits else f"{found}, needs {need.specifier}"


def _machine() -> Iterator[Check]:
    import resource

    yield "python", sys.version_info >= (3, 11), sys.version.split()[0]
    yield "cores", True, str(len(os.sched_getaffinity(0)))
    free = shutil.disk_usage(".").free
    yield "free disk here", free > LOW_DISK_BYTES, f"{free / 1024**3:.1f} GiB"
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    yield "shared memory (Ray's object store)", shm > 0, f"{shm / 1024**3:.1f} GiB"
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield "open files allowed", open_files >= LOW_OPEN_FILES, f"{open_files}"
    yield "NVIDIA driver", True, "present" if os.path.exists("/dev/nvidia0") else "none: training runs on the CPU"
