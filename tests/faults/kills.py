"""Who was killed and when, which kinds of kills are to come, and the figures that come of it."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_S = 0.1


class Diary:
    """Notes with their moment, in a file and on the standard output: every kill is there before the next happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = (folder / "diary.jsonl").open("a", encoding="utf-8")
        self._started = time.monotonic()
        self.kills: Counter[str] = Counter()

    def note(self, what: str, **more: object) -> None:
        at_s = round(time.monotonic() - self._started, 2)
        self._file.write(json.dumps({"at_s": at_s, "what": what, **more}) + "\n")
        self._file.flush()
        print(f"[{at_s:7.1f} s] {what} {' '.join(f'{name}={value}' for name, value in more.items())}", flush=True)

    def kill(self, part: str, kind: str, pid: int, **more: object) -> None:
        """SIGKILL to a process, noted and counted."""
        os.kill(pid, signal.SIGKILL)
        self.count(part, kind, pid=pid, **more)

    def count(self, part: str, kind: str, **more: object) -> None:
        """A kill that somebody else carried out."""
        self.kills[f"{part}.{kind}"] += 1
        self.note("kill", part=part, kind=kind, **more)

    def num_kills(self, part: str) -> int:
        return sum(number for name, number in self.kills.items() if name.startswith(f"{part}."))


class Figures:
    """`name: value unit` lines, and the promises that were broken."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[object, str]] = {}
        self.broken: list[str] = []

    def set(self, name: str, value: object, unit: str = "") -> None:
        self.values[name] = (value, unit)

    def promise(self, is_kept: bool, what: str) -> None:
        if not is_kept:
            self.broken.append(what)

    def lines(self) -> list[str]:
        return [f"{name}: {_shown(value)} {unit}".rstrip() for name, (value, unit) in self.values.items()]


def plan_kills(draw: random.Random, number: int, shares: Mapping[str, float]) -> list[str]:
    """`number` kinds in random order, in about these shares and at least one of each (as far as the number goes)."""
    kinds = list(shares)[:number]
    rest = number - len(kinds)
    kinds += draw.choices(list(shares), list(shares.values()), k=rest)
    draw.shuffle(kinds)
    return kinds


def pause(draw: random.Random, bounds_s: Sequence[float], deadline: float) -> None:
    """Wait for a random time, not beyond the deadline (of time.monotonic)."""
    time.sleep(max(0.0, min(draw.uniform(*bounds_s), deadline - time.monotonic())))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)
