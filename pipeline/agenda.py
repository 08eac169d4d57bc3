"""What an event loop has to look at again, and when."""

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """Things by the time when they are due, a clock's seconds. Those due at the same moment keep their order."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, due: float, thing: T) -> None:
        self._num_added += 1
        heapq.heappush(self._heap, (due, self._num_added, thing))

    def pop_due(self, now: float) -> T | None:
        """Take out the first thing if it is due."""
        return heapq.heappop(self._heap)[2] if self._heap and self._heap[0][0] <= now else None

    def wait_s(self, most_s: float, now: float) -> float:
        """Seconds until something is due, at least 0 and at most `most_s`."""
        return max(0.0, min(most_s, self._heap[0][0] - now)) if self._heap else most_s
