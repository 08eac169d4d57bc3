"""A command that is told to stop ends by itself, quickly, and leaves no process behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.session import RayConfig, start_ray

COMMAND = """
import sys, time
from pathlib import Path
from cluster.cli import run_reporting_errors
from cluster.interrupt import catch_interrupts
from cluster.session import RayConfig, ray_session

def wait(path):
    Path(path).touch()
    time.sleep(120)

def command():
    with ray_session(RayConfig(num_cpus=1)) as executor:
        for _ in executor.map_unordered(wait, [sys.argv[1]], num_cpus=1, memory_bytes=0):
            pass
    return 0

catch_interrupts()
sys.exit(run_reporting_errors("test", command))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_on_local_ray_exits_130_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    started = tmp_path / "started"
    command = psutil.Popen(
        [sys.executable, "-c", COMMAND, str(started)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        family = command.children(recursive=True)
        command.send_signal(number)
        _, error = command.communicate(timeout=10)
    finally:
        if command.poll() is None:
            command.kill()
    assert command.returncode == 130, error.decode()
    assert error.decode().splitlines() == ["test: interrupted; run the same command to go on"]
    assert len(family) > 3
    assert psutil.wait_procs(family, timeout=5)[1] == []


def test_a_stop_while_ray_starts_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `ray.init` returns, Ray's own handler turns SIGTERM into SystemExit."""

    def stopped(*words: object, **settings: object) -> None:
        raise SystemExit(signal.SIGTERM)

    monkeypatch.setattr("ray.init", stopped)
    with pytest.raises(KeyboardInterrupt):
        start_ray(RayConfig())


LISTENERS = """
import psutil
from cluster.session import RayConfig, ray_session
with ray_session(RayConfig(num_cpus=1)) as executor:
    list(executor.map_unordered(lambda n: n, [1], num_cpus=1, memory_bytes=0))
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                print(connection.laddr.ip)
"""


def test_a_local_ray_listens_on_loopback_alone() -> None:
    done = subprocess.run([sys.executable, "-c", LISTENERS], capture_output=True, text=True, check=True)
    addresses = set(done.stdout.split())
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
