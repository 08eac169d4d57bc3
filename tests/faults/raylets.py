"""A Ray cluster of several nodes on this machine, whose parts can be killed one by one."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

NODE = Path(__file__).with_name("ray_node.py")
START_S, END_S, POLL_S = 60.0, 10.0, 0.1
_SERVICES = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::SpillWorker", "ray::RestoreWorker")


class RayNode:
    """A node's process and what runs below it."""

    def __init__(self, folder: Path, environment: Mapping[str, str], join: str | None) -> None:
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.folder, self._address = folder, ""
        self._log = folder / "node.log"
        command = [sys.executable, str(NODE), str(folder), *(["--join", join] if join else [])]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | environment | {"TMPDIR": str(folder / "tmp")},
                start_new_session=True,
            )

    def wait(self) -> str:
        """The cluster's address, once the node is up. Raises RuntimeError with its log if it does not come."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = self._log.read_text().splitlines()
            if found := [line for line in lines if line.startswith("127.0.0.1:")]:
                return found[0]
            time.sleep(POLL_S)
        raise RuntimeError(f"a Ray node did not start:\n{self._log.read_text()[-2000:]}")

    @property
    def has_ended(self) -> bool:
        """A node ends when its raylet dies."""
        return self._process.poll() is not None

    @property
    def raylet(self) -> psutil.Process | None:
        for process in self._below():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def workers(self, title: str) -> list[psutil.Process]:
        """The processes that run a task or an actor, and whose title begins so."""
        found = []
        raylet = self.raylet
        for process in raylet.children() if raylet else []:
            with contextlib.suppress(psutil.Error):
                shown = (process.cmdline() or [""])[0]
                if shown.startswith(title) and not shown.startswith(_SERVICES):
                    found.append(process)
        return found

    def close(self) -> None:
        """End everything of the node at once."""
        below = self._below()
        self._process.kill()
        self._process.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=END_S)

    def _below(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []


class RayCluster:
    """A head and further nodes of one core each. environment: what their workers are to see."""

    def __init__(self, folder: Path, environment: Mapping[str, str], num_nodes: int = 3) -> None:
        self._folder, self._num_nodes = folder, num_nodes
        # Ray makes its workers yield to everybody else on the machine: fine, but for a drill with a time limit.
        self._environment = {**environment, "RAY_worker_niceness": "0"}
        self._nodes: list[RayNode] = []
        self._num_started = 0
        self.address = ""

    def driver_environment(self) -> dict[str, str]:
        """For commands that use the cluster: a driver, too, listens on loopback alone."""
        return {**os.environ, **self._environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def start(self) -> None:
        head = self._start_node(None)
        self.address = head.wait()
        for node in [self.add_node() for _ in range(self._num_nodes - 1)]:
            node.wait()

    def add_node(self) -> RayNode:
        """Begin to start one more node."""
        return self._start_node(self.address)

    def busy_workers(self, title: str = "ray::") -> list[psutil.Process]:
        return [worker for node in self._nodes for worker in node.workers(title)]

    def raylets(self) -> list[psutil.Process]:
        """Those of the nodes that joined."""
        return [raylet for node in self._nodes[1:] if (raylet := node.raylet)]

    def gcs(self) -> psutil.Process:
        """The head's GCS server."""
        for process in self._nodes[0]._below():
            with contextlib.suppress(psutil.Error):
                if process.name() == "gcs_server":
                    return process
        raise RuntimeError("the head runs no GCS")

    def forget_dead(self) -> None:
        """Leave out nodes whose raylet was killed."""
        self._nodes = [node for node in self._nodes if not node.has_ended]

    def close(self) -> None:
        for node in reversed(self._nodes):
            node.close()
        self._nodes = []

    def _start_node(self, join: str | None) -> RayNode:
        self._num_started += 1
        node = RayNode(self._folder / str(self._num_started), self._environment, join)
        self._nodes.append(node)
        return node


@contextlib.contextmanager
def ray_cluster(folder: Path, environment: Mapping[str, str]) -> Iterator[RayCluster]:
    """A running cluster of three nodes."""
    cluster = RayCluster(folder, environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
