"""kill -9 at any moment, then the same command: the bytes of an undisturbed build."""

import contextlib
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
from pipeline.manifest import read_manifest

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
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::fetch_unit"]:
                found.append(process)
    return found


def kill(build: psutil.Popen) -> None:
    """Kill a driver. Its busy workers must go with it; Ray's own processes would need another minute."""
    family, workers = build.children(recursive=True), fetching_workers(build)
    os.kill(build.pid, signal.SIGKILL)
    build.wait()
    build.stderr.close()
    _, left = psutil.wait_procs(workers, timeout=10)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert left == []


@pytest.mark.slow
def test_killed_driver_resumes_to_the_same_bytes(dataset: Path, words: Any, tmp_path: Path, slow: Any) -> None:
    folder = tmp_path / "out"
    build = start(words(folder, "ray.address=", "ray.num_cpus=2"))
    wait_until(lambda: num_fetched(folder) >= 1, build)
    kill(build)
    assert num_fetched(folder) < NUM_FETCH_UNITS
    assert not (folder / "manifest.json").exists()
    slow.delay_s = 0.0
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)
    assert orphans(folder) == set()


@pytest.mark.slow
def test_two_ray_workers_of_which_one_is_killed_make_the_same_bytes(
    dataset: Path, words: Any, tmp_path: Path, slow: Any
) -> None:
    folder = tmp_path / "out"
    build = start(words(folder, "ray.address=", "ray.num_cpus=2"))
    workers = wait_until(lambda: num_fetched(folder) and fetching_workers(build), build)
    os.kill(workers[0].pid, signal.SIGKILL)
    slow.delay_s = 0.0
    _, error = build.communicate(timeout=PATIENCE_S)
    assert build.returncode == 0, error.decode()
    assert published(folder) == published(dataset)
    assert orphans(folder) == set()


def test_killed_after_every_stage_resumes_to_the_same_bytes(dataset: Path, words: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for stage in ("plan-order", "exact-keys", "exact-drops", "pack"):
        build = start(words(folder))
        done = folder / "journal" / stage
        wait_until(lambda done=done: done.is_dir() and list(done.glob("*.json")), build)
        kill(build)
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)
    assert orphans(folder) == set()


def test_all_kinds_of_duplicates_are_the_same_after_a_kill_and_with_two_workers(words: Any, tmp_path: Path) -> None:
    settings = ("dedup.exact=false", "dedup.by_url=true", "dedup.by_bytes_and_caption=true", "dedup.near_distance=3")
    assert main(["build", *words(tmp_path / "whole", *settings)]) == 0
    counts = read_manifest(str(tmp_path / "whole"))[1].counts
    assert counts["near_duplicate"] == 4
    assert counts["duplicate_url"] == 1
    folder = tmp_path / "out"
    build = start(words(folder, *settings))
    done = folder / "journal/near-members"
    wait_until(lambda: done.is_dir() and list(done.glob("*.json")), build)
    kill(build)
    assert main(["build", *words(folder, *settings, "ray.address=", "ray.num_cpus=2")]) == 0
    assert published(folder) == published(tmp_path / "whole")
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
    assert build.returncode == 130, error.decode()
    assert "interrupted; run the same command to go on" in error.decode()
    assert "Traceback" not in error.decode()
    slow.delay_s = 0.0
    assert main(["build", *words(folder)]) == 0
    assert published(folder) == published(dataset)
