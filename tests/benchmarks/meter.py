"""What a command and its processes take: CPU seconds between two moments, and the most memory of one of them."""

import threading
import time
from bisect import bisect_right
from dataclasses import dataclass, field

import psutil

INTERVAL_S = 0.1


@dataclass(kw_only=True)
class TreeMeter:
    """Samples a process and all below it, in a thread. Use as a context manager."""

    pid: int
    times: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_rss_bytes: dict[int, int] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)
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
        return self._cpu_at(end) - self._cpu_at(start)

    def peak_rss_mib(self, title: str) -> float:
        """The most memory of any process whose command line holds `title`."""
        peaks = [peak for pid, peak in self.peak_rss_bytes.items() if title in self.titles[pid]]
        return max(peaks, default=0) / 2**20

    def _cpu_at(self, moment: float) -> float:
        index = min(max(1, bisect_right(self.times, moment)), len(self.times) - 1)
        before, after = self.times[index - 1], self.times[index]
        share = min(1.0, max(0.0, (moment - before) / (after - before)))
        return self.cpu_s[index - 1] + share * (self.cpu_s[index] - self.cpu_s[index - 1])

    def _run(self) -> None:
        used: dict[int, float] = {}
        while not self._stop.is_set():
            for process in _tree(self.pid):
                try:
                    with process.oneshot():
                        times = process.cpu_times()
                        used[process.pid] = times.user + times.system
                        rss = process.memory_info().rss
                        self.titles[process.pid] = " ".join(process.cmdline())
                    self.peak_rss_bytes[process.pid] = max(rss, self.peak_rss_bytes.get(process.pid, 0))
                except psutil.Error:  # it has just ended: what it used stays counted
                    continue
            self.times.append(time.time())
            self.cpu_s.append(sum(used.values()))
            self._stop.wait(INTERVAL_S)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []
