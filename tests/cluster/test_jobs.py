"""`pairmill submit` against a real Ray cluster with token authentication: same command, its log, its exit status."""

import contextlib
import functools
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from cluster.errors import RequestError, RunError
from cluster.jobs import as_settings, entrypoint, follow, submit_command

TOKEN = "5f1c6f6c9d1a4a0b8e2d7c3b4a596877"
START_TIMEOUT_S = 90


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, **more}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard URL of `ray start --head` on this machine, which asks for TOKEN."""
    dashboard = free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={tmp_path_factory.mktemp('r')}"]
    with open(tmp_path_factory.mktemp("log") / "ray.log", "wb") as log:
        head = subprocess.Popen(
            command,
            # The third keeps Ray's own processes on loopback (see cluster.session).
            env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(f"http://127.0.0.1:{dashboard}"):
            assert head.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def picture_server(folder: Path) -> Iterator[int]:
    """Twelve small pictures, served from a thread."""
    pictures = folder / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        cv2.imwrite(str(pictures / f"{number}.png"), noise.integers(0, 256, (48, 48, 3), np.uint8))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def answers(url: str) -> bool:
    """The job API is up: Ray's dashboard answers before its job agent does, so ask for the list of jobs."""
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def submit(
    *words: str, url: str, token: str | None = TOKEN, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    secret = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"} if token else {"RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "cluster.cli", "submit", *words, "--address", url],
        env=environment(**secret),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=cwd,
    )


def test_a_wrong_request_comes_back_as_exit_2_with_its_message(cluster: str, tmp_path: Path) -> None:
    done = submit("build", "inputt=a.parquet", url=cluster, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "did you mean input?" in done.stdout


def test_a_submitted_build_and_training_end_with_0_and_their_results(cluster: str, tmp_path: Path) -> None:
    with picture_server(tmp_path) as port:
        lines = [f"http://127.0.0.1:{port}/{n}.png,a picture of number {n}" for n in range(12)]
        (tmp_path / "urls.csv").write_text("\n".join(["url,caption", *lines]))
        (tmp_path / "build.yaml").write_text("fetch: {allow_private_addresses: true}\nimage: {size: 32}\n")
        built = submit("build", "build.yaml", "input=urls.csv", "output=data", url=cluster, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "12 samples in 1 shard" in built.stdout
    assert "WebSocket" not in built.stderr, "what the client library says is not for people"
    (tmp_path / "train.yaml").write_text(
        "model: {vision: {size: nano, image_size: 32, patch_size: 16}, embed_dim: 16,\n"
        "  text: {width: 16, depth: 1, heads: 2, context_length: 16, vocabulary: compact}}\n"
        "train: {batch_size: 4, num_steps: 2, num_ranks: 2}\noptim: {warmup_steps: 1}\n"
    )
    trained = submit("train", "train.yaml", "data.dataset=data", "output=model", url=cluster, cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert len((tmp_path / "model" / "metrics" / "rank1.jsonl").read_text().splitlines()) >= 1
    assert list((tmp_path / "model" / "checkpoints").glob("step-*.json"))


def test_a_missing_token_is_explained(cluster: str) -> None:
    done = submit("build", "input=a.parquet", url=cluster, token=None)
    assert done.returncode == 2
    assert "token authentication: set RAY_AUTH_TOKEN" in done.stderr


def test_a_wrong_token_is_explained(cluster: str) -> None:
    done = submit("build", "input=a.parquet", url=cluster, token="0" * 32)
    assert done.returncode == 2
    assert "the cluster refused us" in done.stderr


def test_an_absent_cluster_is_named() -> None:
    done = submit("build", "input=a.parquet", url=f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "no Ray dashboard answers there" in done.stderr


def test_yaml_files_travel_as_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("input: [a b.parquet]\nfetch: {retries: 3, user_agent: 'x: y'}\n")
    assert as_settings({"input": ["a b.parquet"], "fetch": {"retries": 3}}) == [
        'input=["a b.parquet"]',
        "fetch.retries=3",
    ]
    line = entrypoint(["build", str(file), "seed=1"])
    assert "fetch.retries=3" in line
    assert "'fetch.user_agent=\"x: y\"'" in line
    assert line.endswith("seed=1")
    assert str(file) not in line


class GoneCluster:
    """Takes no job, or a job and is gone."""

    def submit_job(self, **settings: object) -> str:
        raise RuntimeError("Request failed with status code 400:\nsubmission id night already exists")

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "one line\n"
        raise ConnectionError("the dashboard hung up")


def test_a_job_that_is_not_taken_is_a_refused_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.jobs.connect", lambda address: GoneCluster())
    with pytest.raises(RequestError, match=r"did not take the job: submission id night already exists"):
        submit_command(["build", "input=a", "--address", "http://127.0.0.1:8265", "--job-id", "night"])


def test_a_cluster_that_goes_away_is_told_with_how_to_look_again() -> None:
    with pytest.raises(RunError, match=r"lost sight of job night: the dashboard hung up.*ray job status night"):
        follow(GoneCluster(), "night")


def test_a_cluster_that_has_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting:
        num_asked = 0

        def submit_job(self, **settings: object) -> str:
            self.num_asked += 1
            if self.num_asked < 3:
                raise RuntimeError("Request failed with status code 500: No available agent, please try again later.")
            return "night"

    monkeypatch.setattr("cluster.jobs.connect", lambda address: Starting())
    monkeypatch.setattr("cluster.jobs.POLL_INTERVAL_S", 0.0)
    assert submit_command(["build", "input=a", "--address", "http://127.0.0.1:8265", "--detach"]) == 0
