"""A small part of `make faults`, and that it leaves nothing behind."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from drill_store import StoreDrill
from kills import Diary, Figures, plan_kills

HERE = Path(__file__).parent
STRAY = "import sys, time; open(sys.argv[1], 'w').write('up'); time.sleep(600)"
SUPERVISED = f"""
import subprocess, sys, time
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from supervisor import supervised

def work(folder):
    (folder / "file").write_text("something")
    print(folder, flush=True)
    subprocess.Popen([sys.executable, "-c", {STRAY!r}, str(folder / "up")], start_new_session=True)
    while not (folder / "up").exists():
        time.sleep(0.01)
    print(*[each.pid for each in __import__("psutil").Process().children()], flush=True)
    time.sleep(float(sys.argv[1]))
    return 7

sys.exit(supervised(work, limit_s=float(sys.argv[2])))
"""


@pytest.mark.timeout(120)
def test_a_store_that_errs_resets_and_is_killed_keeps_every_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # the drill sets them: put back afterwards
    figures = Figures()
    StoreDrill(seed=1, num_clients=2, num_turns=4, num_kills=1).run(tmp_path, Diary(tmp_path), figures)
    assert figures.broken == []
    assert figures.values["faults.store.wrong"] == (0, "")
    assert figures.values["faults.store.kills"] == (1, "")


@pytest.mark.parametrize("ending", ["by itself", "limit", "SIGINT", "SIGTERM", "watcher killed", "child killed"])
def test_whatever_ends_the_harness_it_leaves_neither_process_nor_folder(ending: str) -> None:
    lasts_s, limit_s = {"by itself": (0.1, 60.0), "limit": (60.0, 0.5)}.get(ending, (60.0, 60.0))
    command = [sys.executable, "-c", SUPERVISED, str(lasts_s), str(limit_s)]
    watcher = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder, stray = Path(watcher.stdout.readline().decode().strip()), int(watcher.stdout.readline())
    assert psutil.pid_exists(stray)
    if ending.startswith("SIG"):
        watcher.send_signal(getattr(signal, ending))
    elif ending == "watcher killed":
        watcher.kill()
    elif ending == "child killed":
        os.kill(watcher.children()[0].pid, signal.SIGKILL)
    status = watcher.wait(30)
    watcher.stdout.close()
    watcher.stderr.close()
    deadline = time.monotonic() + 20
    while (folder.exists() or _runs(stray)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()
    assert not _runs(stray)
    expected = {"by itself": 7, "limit": 124, "watcher killed": -9, "child killed": 128 + 9}
    assert status == expected.get(ending, 130)


def test_every_kind_of_kill_is_planned_in_an_order_of_the_seed() -> None:
    shares = {"worker": 0.6, "driver": 0.3, "raylet": 0.1}
    plan = plan_kills(random.Random(3), 12, shares)
    assert len(plan) == 12
    assert set(plan) == set(shares)
    assert plan == plan_kills(random.Random(3), 12, shares)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
