"""A command whose cluster is gone ends with a message, also where it hangs inside Ray."""

import socket
import subprocess
import sys
import time

import pytest

from cluster import lifeline as module
from cluster.errors import RunError
from cluster.lifeline import lifeline, raise_if_lost

HANGING = """
import sys, time
from cluster import lifeline
lifeline.PROBE_S, lifeline.PATIENCE_S, lifeline.GRACE_S = 0.05, 0.2, 0.2
with lifeline.lifeline(sys.argv[1]):
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.02)
    monkeypatch.setattr(module, "PATIENCE_S", 0.4)


def address_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_cluster_that_answers_is_not_lost() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, lifeline(address_of(listener)):
        time.sleep(0.5)
        raise_if_lost()


def test_a_cluster_that_went_away_is_said_to_whoever_asks() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with lifeline(address_of(listener)):
        listener.close()
        time.sleep(0.2)
        raise_if_lost()  # not yet
        time.sleep(0.8)
        with pytest.raises(RunError, match=r"the Ray cluster has not answered .* run the same command"):
            raise_if_lost()
    with socket.create_server(("127.0.0.1", 0)) as another, lifeline(address_of(another)):
        raise_if_lost()  # the next cluster starts with a clean slate


def test_a_command_that_hangs_is_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address_of(listener)
    done = subprocess.run(
        [sys.executable, "-c", HANGING, address], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pairmill: the Ray cluster has not answered")
