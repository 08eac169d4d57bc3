"""Two commands never work in one run's folder; a dead one's place is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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
    store.remove(lease.LEASE_FILE)
    return store


def leave_sign(store: Store, **changes: Any) -> None:
    sign = {"host": "elsewhere", "pid": 1, "token": "x", "renewed": time.time()} | changes
    store.write_bytes(lease.LEASE_FILE, json.dumps(sign).encode())


def test_object_store_is_held_renewed_and_given_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    with lease.hold(store):
        first = json.loads(store.read_bytes(lease.LEASE_FILE))
        with pytest.raises(RequestError, match=rf"process {os.getpid()} on {socket.gethostname()}"), lease.hold(store):
            pass
        deadline = time.monotonic() + 5
        while json.loads(store.read_bytes(lease.LEASE_FILE))["renewed"] == first["renewed"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not store.exists(lease.LEASE_FILE)


def test_object_store_is_taken_over_from_the_dead_only(store: Store) -> None:
    leave_sign(store)
    with pytest.raises(RequestError, match="process 1 on elsewhere is training"), lease.hold(store):
        pass
    leave_sign(store, renewed=time.time() - lease.STALE_S - 1)
    with lease.hold(store):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_sign(store, host=socket.gethostname(), pid=gone.pid)
    with lease.hold(store):
        pass
