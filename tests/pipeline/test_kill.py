"""kill -9 at any moment, then the same command: the bytes of an undisturbed build."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.journal import Journal
from cluster.store import Store
from pipeline.__main__ import main

PATIENCE_S = 90.0
NUM_FETCH_UNITS = 6


@pytest.fixture
def slow(site: Any) -> Iterator[Any]:
    """Answers take long enough for something to happen in mid-build: a fetch unit takes about a second."""
    site.delay_s = 0.6
    yield site
    site.delay_s = 0.0


def published(folder: Path) -> dict[str, bytes]:
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def orphans(folder: Path) -> set[str]:
    """Files and folders in work/ that no marker names."""
    journal = Journal(Store(str(folder)))
    stages = {path.name for path in (folder / "journal").iterdir() if path.is_dir()}
    named = {
        folder / output.path
        for stage in stages
        for marker in journal.markers(stage).values()
        for output in marker.outputs
    }
    named |= {parent for path in named for parent in path.parents}
    return {str(path.relative_to(folder)) for path in (folder / "work").rglob("*") if path not in named}


def start(words: list[str]) -> psutil.Popen:
    return psutil.Popen(
        [sys.executable, "-P", "-m", "pipeline", "build", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_until(condition: Callable[[], Any], build: psutil.Popen) -> Any:
    """What the condition comes to; fails when the build ends before, or nothing happens for long."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if build.poll() is not None:
            pytest.fail(f"the build ended first, with {build.returncode}: {build.stderr.read().decode()[-2000:]}")
        time.sleep(0.02)
    build.kill()
    raise TimeoutError("nothing happened")


def num_fetched(folder: Path) -> int:
    return len(list((folder / "journal/fetch").glob("*.json")))


def fetching_workers(build: psutil.Popen) -> list[psutil.Process]:
    found = []
    for process in build.children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::fetch_unit"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def end(build: psutil.Popen, family: list[psutil.Process]) -> None:
    """Wait until a killed driver's workers are gone with it; Ray's agents would need another minute."""
    build.wait()
    build.stderr.close()
    _, alive = psutil.wait_procs(family, timeout=4)
    left = {process.name() for process in alive}
    for process in alive:
        process.kill()
    assert not any(name.endswith("_unit") for name in left), left


@pytest.mark.slow
def test_killed_driver_resumes_to_the_same_bytes(dataset: Path, words: Any, tmp_path: Path, slow: Any) -> None:
    folder = tmp_path / "out"
    command = words(folder, "ray.address=", "ray.num_cpus=2")
    build = start(command)
    wait_until(lambda: num_fetched(folder) >= 1, build)
    family = build.children(recursive=True)
    os.kill(build.pid, signal.SIGKILL)
    end(build, family)
    done = num_fetched(folder)
    assert done < NUM_FETCH_UNITS
    assert not (folder / "manifest.json").exists()
    slow.delay_s = 0.0
    assert main(["build", *command]) == 0
    assert published(folder) == published(dataset)
    assert orphans(folder) == set()


@pytest.mark.slow
def test_killed_worker_is_replaced_and_the_bytes_are_the_same(
    dataset: Path, words: Any, tmp_path: Path, slow: Any
) -> None:
    folder = tmp_path / "out"
    build = start(words(folder, "ray.address=", "ray.num_cpus=2"))
    workers = wait_until(lambda: num_fetched(folder) and fetching_workers(build), build)
    os.kill(workers[0].pid, signal.SIGKILL)
    _, error = build.communicate(timeout=PATIENCE_S)
    assert build.returncode == 0, error.decode()
    assert published(folder) == published(dataset)
    assert orphans(folder) == set()


@pytest.mark.parametrize("stage", ["plan-order", "dedup", "pack"])
def test_killed_between_stages_resumes_to_the_same_bytes(dataset: Path, words: Any, tmp_path: Path, stage: str) -> None:
    folder = tmp_path / "out"
    build = start(words(folder))
    wait_until(
        lambda: (folder / "journal" / stage).is_dir() and list((folder / "journal" / stage).glob("*.json")), build
    )
    os.kill(build.pid, signal.SIGKILL)
    end(build, [])
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)
    assert orphans(folder) == set()


def test_what_a_killed_attempt_left_is_swept(dataset: Path, words: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(["build", *words(folder)]) == 0
    (folder / "manifest.json").unlink()
    for path in ("work/fetch/00000-00001.0123456789ab.tmp/images.tar", "work/pack/00000.0123456789ab.tmp/samples.tar"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"half")
    assert len(orphans(folder)) >= 4
    assert main(["build", *words(folder)]) == 0
    assert orphans(folder) == set()
    assert published(folder) == published(dataset)


def test_interrupted_build_exits_130_and_resumes(dataset: Path, words: Any, tmp_path: Path, slow: Any) -> None:
    folder = tmp_path / "out"
    build = start(words(folder))
    wait_until(lambda: num_fetched(folder) >= 1, build)
    build.send_signal(signal.SIGINT)
    _, error = build.communicate(timeout=30)
    assert build.returncode == 130
    assert "interrupted; run the same command to go on" in error.decode()
    assert "Traceback" not in error.decode()
    slow.delay_s = 0.0
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)
