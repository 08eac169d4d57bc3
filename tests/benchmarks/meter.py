"""What a command and its processes take: CPU seconds between two moments, and the most memory of a worker.

A worker is a process whose command line says so, and all below it. Its memory is the sum of their proportional set
sizes: pages that processes share are counted once.
"""

import contextlib
import threading
import time
from bisect import bisect_right
from dataclasses import dataclass, field

import psutil

INTERVAL_S = 0.1
MEMORY_EVERY = 5
"""Samples of CPU time to one of memory, which costs the kernel a walk through every page."""


@dataclass(kw_only=True)
class TreeMeter:
    """Samples a process and all below it, in a thread. Use as a context manager."""

    pid: int
    worker: str = ""
    """What the command line of a worker holds; "" measures no memory."""
    interval_s: float = INTERVAL_S
    """To look at every process of the machine takes milliseconds: a short run on all cores wants fewer samples."""
    times: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    worker_cpu_s: list[float] = field(default_factory=list)
    peak_worker_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "TreeMeter":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_between(self, start: float, end: float) -> float:
        """CPU seconds of the whole tree between two moments of `time.time()`."""
        return self._at(end, self.cpu_s) - self._at(start, self.cpu_s)

    def worker_cpu_between(self, start: float, end: float) -> float:
        """The part of it that workers used."""
        return self._at(end, self.worker_cpu_s) - self._at(start, self.worker_cpu_s)

    def _at(self, moment: float, used_s: list[float]) -> float:
        index = min(max(1, bisect_right(self.times, moment)), len(self.times) - 1)
        before, after = self.times[index - 1], self.times[index]
        share = min(1.0, max(0.0, (moment - before) / (after - before)))
        return used_s[index - 1] + share * (used_s[index] - used_s[index - 1])

    def _run(self) -> None:
        used: dict[int, float] = {}
        is_worker: dict[int, bool] = {}
        while not self._stop.is_set():
            processes = _tree(self.pid)
            for process in processes:
                with contextlib.suppress(psutil.Error):  # it has just ended: what it used stays counted
                    times = process.cpu_times()
                    used[process.pid] = times.user + times.system
                    if not is_worker.get(process.pid):  # Ray names its workers when their work begins
                        is_worker[process.pid] = self._is_worker(process) or is_worker.get(process.ppid(), False)
            self.times.append(time.time())
            self.cpu_s.append(sum(used.values()))
            self.worker_cpu_s.append(sum(seconds for pid, seconds in used.items() if is_worker.get(pid)))
            if self.worker and len(self.times) % MEMORY_EVERY == 0:
                self._measure_workers(processes)
            self._stop.wait(self.interval_s)

    def _is_worker(self, process: psutil.Process) -> bool:
        return bool(self.worker) and self.worker in " ".join(process.cmdline())

    def _measure_workers(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if self._is_worker(process):
                    size = sum(_proportional_bytes(member) for member in _tree(process.pid))
                    self.peak_worker_bytes = max(self.peak_worker_bytes, size)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
