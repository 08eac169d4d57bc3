"""Two commands never work in one run's folder; a dead one's place is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RequestError
from cluster.store import Store
from training import lease
from training.command import TrainResult

HOLDER = "import sys, time; from cluster.store import Store; from training.lease import hold\n"
HOLDER += "with hold(Store(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_second_command_on_a_folder_is_refused_until_the_first_is_gone(
    train_tiny: Callable[..., TrainResult], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_tiny(run, "checkpoint.keep=9").outcome == "done"
    (run / "result.json").unlink()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = sorted(path for path in run.rglob("*"))
        with pytest.raises(RequestError, match=rf"process {holder.pid} on .* is training in this folder"):
            train_tiny(run, "checkpoint.keep=9")
        assert sorted(path for path in run.rglob("*")) == before
        holder.send_signal(signal.SIGKILL)
    assert train_tiny(run, "checkpoint.keep=9").outcome == "done"


@pytest.fixture
def store() -> Store:
    store = Store("memory://lease-test")
    store.remove(lease.LEASE_FOLDER)
    return store


def signs(store: Store) -> dict[str, dict[str, Any]]:
    return {entry.path: json.loads(store.read_bytes(entry.path)) for entry in store.find(lease.LEASE_FOLDER)}


def leave_sign(store: Store, number: int, **changes: Any) -> None:
    sign = {"host": "elsewhere", "pid": 1, "token": "x", "renewed": time.time()} | changes
    store.write_bytes(f"{lease.LEASE_FOLDER}/{number:06}.json", json.dumps(sign).encode())


def test_object_store_is_held_renewed_and_given_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    with lease.hold(store):
        ((path, first),) = signs(store).items()
        with pytest.raises(RequestError, match=rf"process {os.getpid()} on {socket.gethostname()}"), lease.hold(store):
            pass
        deadline = time.monotonic() + 5
        while signs(store)[path]["renewed"] == first["renewed"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with lease.hold(store):
        assert len(signs(store)) == 1, "only the newest is kept"
        assert path not in signs(store), "a number is never held twice"


def test_object_store_is_taken_over_from_the_dead_only(store: Store) -> None:
    leave_sign(store, 1)
    with pytest.raises(RequestError, match="process 1 on elsewhere is training"), lease.hold(store):
        pass
    leave_sign(store, 1, renewed=time.time() - lease.STALE_S - 1)
    with lease.hold(store):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_sign(store, 3, host=socket.gethostname(), pid=gone.pid)
    with lease.hold(store):
        pass


def test_of_many_who_find_a_dead_holder_one_takes_over(store: Store) -> None:
    leave_sign(store, 1, renewed=0.0)
    start, done = threading.Barrier(8), threading.Barrier(8)

    def take() -> bool:
        start.wait()
        try:
            with lease.hold(store):
                done.wait(10)
                return True
        except RequestError:
            done.wait(10)
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: take(), range(8))) == [False] * 7 + [True]


def test_one_who_was_slow_does_not_get_a_number_that_was_held_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has found number 1 dead; before it goes on, another holds 2 and gives it back, and a third holds 3."""
    leave_sign(store, 1, renewed=0.0)
    is_alive = lease._is_alive

    def slow(sign: dict[str, Any]) -> bool:
        monkeypatch.setattr(lease, "_is_alive", is_alive)
        store.remove(f"{lease.LEASE_FOLDER}/000001.json")
        leave_sign(store, 3)
        return False

    monkeypatch.setattr(lease, "_is_alive", slow)
    with pytest.raises(RequestError, match="process 1 on elsewhere is training"), lease.hold(store):
        pass
    assert list(signs(store)) == [f"{lease.LEASE_FOLDER}/000003.json"]


def test_a_holder_that_was_taken_over_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with lease.hold(store):
            leave_sign(store, 2)
            deadline = time.monotonic() + 5
            while not ended.is_set():
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signs(store)[f"{lease.LEASE_FOLDER}/000002.json"]["renewed"] > 0, "the other's sign is left alone"
