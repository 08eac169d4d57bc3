"""The same list, responses and settings: the same bytes, however many work on it and wherever it is written.

One worker without Ray is the `dataset` of the other tests; an object store is in test_s3_build.py, kills in
test_kill.py.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from raylets import ray_cluster

from pipeline.__main__ import main

Words = Callable[..., list[str]]
BUILD_S = 120.0


def published(folder: Path) -> dict[str, bytes]:
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_four_workers_make_what_one_does(dataset: Path, words: Words, tmp_path: Path) -> None:
    assert main(["build", *words(tmp_path / "out", "ray.address=", "ray.num_cpus=4", "fetch.num_cpus=1")]) == 0
    assert published(tmp_path / "out") == published(dataset)


@pytest.mark.slow
def test_three_raylets_make_what_one_process_does(dataset: Path, words: Words, tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,  # its sockets need a short path
        ray_cluster(Path(folder) / "c", {}) as cluster,
    ):
        command = [sys.executable, "-P", "-m", "pipeline", "build"]
        done = subprocess.run(
            [*command, *words(tmp_path / "out", f"ray.address={cluster.address}")],
            env=cluster.driver_environment(),
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert published(tmp_path / "out") == published(dataset)
