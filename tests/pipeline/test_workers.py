import threading
import time

import pytest

from pipeline.workers import BATCH, Workers


def take_all(workers: Workers[int, int], woken: threading.Event) -> list[int]:
    results: list[int] = []
    while workers.num_open:
        assert woken.wait(10)  # nobody polls: a result that wakes nobody is lost
        woken.clear()
        results += workers.take()
    return results


@pytest.mark.parametrize("number", [1, 3])
def test_every_result_comes_and_the_waker_is_called(number: int) -> None:
    woken = threading.Event()
    with Workers(number, lambda item: item * 2, woken.set) as workers:
        for count in (1, BATCH * 5 + 3):
            for item in range(count):
                workers.give(item)
            assert sorted(take_all(workers, woken)) == [item * 2 for item in range(count)]


def test_errors_come_to_the_one_who_takes() -> None:
    woken = threading.Event()
    with Workers(1, lambda item: 1 // item, woken.set) as workers:
        workers.give(0)
        with pytest.raises(ZeroDivisionError):
            take_all(workers, woken)


def test_leaving_waits_for_what_is_under_way_and_forgets_the_rest() -> None:
    started, done = threading.Event(), []

    def work(item: int) -> None:
        started.set()
        time.sleep(0.05)
        done.append(item)

    with Workers(1, work, lambda: None) as workers:
        for item in range(50):
            workers.give(item)
        assert started.wait(10)
    assert done in ([0], [0, 1])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker")]
