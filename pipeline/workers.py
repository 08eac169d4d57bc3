"""Threads beside an event loop: work goes in one by one, results come out in batches."""

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

BATCH = 16
"""Results that are worth waking the event loop for while there is more to do: a turn of it costs 20 us."""


class Workers(Generic[T, R]):
    """Applies a function in `number` threads. `wake` is called, from any of them, when `take` has something to give.

    A third of the cost of concurrent.futures, which matters at a millisecond an image.
    """

    def __init__(self, number: int, function: Callable[[T], R], wake: Callable[[], None]) -> None:
        self._function = function
        self._wake = wake
        self._todo: SimpleQueue[T | None] = SimpleQueue()
        self._done: deque[R | BaseException] = deque()
        self._threads = [threading.Thread(target=self._work, name=f"worker {i}", daemon=True) for i in range(number)]
        self.num_open = 0
        """Items given whose results have not been taken."""
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Workers[T, R]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the items that are being worked on; others are forgotten."""
        while not self._todo.empty():
            self._todo.get()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def give(self, item: T) -> None:
        self.num_open += 1
        self._todo.put(item)

    def take(self) -> list[R]:
        """Results that are there, as they came. Raises what the function raised."""
        taken = []
        while self._done:
            result = self._done.popleft()
            self.num_open -= 1
            if isinstance(result, BaseException):
                raise result
            taken.append(result)
        return taken

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            try:
                self._done.append(self._function(item))
            except BaseException as error:
                self._done.append(error)
            if self._todo.empty() or len(self._done) >= BATCH:
                self._wake()
