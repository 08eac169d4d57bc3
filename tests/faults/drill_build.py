"""`pairmill build` to S3 on a cluster of three raylets, while everything that can be killed is killed."""

import random
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
from audit import audit
from kills import Diary, Figures, pause, plan_kills
from raylets import RayCluster
from s3_server import BUCKET, S3Server, s3_server
from store_proxy import StoreProxy

CORPUS = Path(__file__).parents[1] / "corpus"
KINDS = {"worker": 0.4, "driver": 0.2, "raylet": 0.2, "s3": 0.15, "head": 0.05}
BETWEEN_S, DOWN_S, JOIN_S = (0.5, 9.0), (0.2, 6.0), (0.0, 3.0)
WORKER_PATIENCE_S, STOP_PATIENCE_S, POLL_S = 40.0, 90.0, 0.1
END_SHARE = 0.3
"""Of the time, for the last build to end after the last kill."""
SETTINGS = (
    "fetch.allow_private_addresses=true",
    "fetch.timeout_s=10",
    "fetch.connect_timeout_s=5",
    "fetch.backoff_s=0.2",
    "fetch.memory_mib=256",
    "image.size=64",
    "curate.min_side_px=32",
    "curate.max_aspect_ratio=3",
    "plan.rows_per_unit=60",
    "pack.samples_per_shard=100",
)


def write_short_list(path: Path, port: int, num_pairs: int) -> int:
    """A list of the corpus, without the pictures that never come: with retries each costs half a minute."""
    sys.path.insert(0, str(CORPUS))
    from lists import write_list

    write_list(path, port, num_pairs=num_pairs)
    table = pq.read_table(path)
    never = pc.fill_null(pc.match_substring(table["url"], "/never/"), False)
    table = table.filter(pc.invert(never))
    pq.write_table(table, path)
    return int(table.num_rows)


def build_command(url_list: Path, output: str | Path, address: str) -> list[str]:
    words = [f"input={url_list}", f"output={output}", f"ray.address={address}", *SETTINGS]
    return [sys.executable, "-P", "-m", "pipeline", "build", *words]


class Driver:
    """The command, started again whenever it was killed; what it says goes to a file."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment, self._log = environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str]) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        """The last thing that it said."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, kw_only=True)
class BuildDrill:
    """`num_kills` kills at random moments of builds of the same list, one after the other until all have happened."""

    seed: int
    num_kills: int
    limit_s: float = 420.0

    def run(self, folder: Path, reference: Path, url_list: Path, diary: Diary, figures: Figures) -> None:
        """reference: an undisturbed build of the list, on a local disk."""
        with ExitStack() as stack:
            server = stack.enter_context(s3_server(folder / "s3"))
            proxy = stack.enter_context(StoreProxy(server.endpoint_url, self.seed))
            drill = _Course(self, folder, server, proxy, reference, url_list, diary, figures)
            stack.callback(drill.close)
            drill.run()


class _Course:
    """One run of the drill."""

    def __init__(
        self,
        plan: BuildDrill,
        folder: Path,
        server: S3Server,
        proxy: StoreProxy,
        reference: Path,
        url_list: Path,
        diary: Diary,
        figures: Figures,
    ) -> None:
        self._plan, self._folder, self._server, self._proxy = plan, folder, server, proxy
        self._reference, self._list, self._diary, self._figures = reference, url_list, diary, figures
        self._deadline = time.monotonic() + plan.limit_s
        self._last_kill = self._deadline - END_SHARE * plan.limit_s
        self._draw = random.Random(plan.seed)
        store = server.environment | {"AWS_ENDPOINT_URL": proxy.url, "OMP_NUM_THREADS": "1"}
        self._cluster = RayCluster(folder / "ray", store)
        self._driver = Driver(self._cluster.driver_environment(), diary.folder / "build.log")
        self._round = self._num_stops = 0
        self._lost = self._duplicated = 0
        self._differing: list[str] = []

    def run(self) -> None:
        self._cluster.start()
        self._start_build()
        for kind in plan_kills(self._draw, self._plan.num_kills, KINDS):
            pause(self._draw, BETWEEN_S, self._last_kill)
            self._look_after_driver()
            if time.monotonic() > self._last_kill:
                self._figures.promise(False, f"build: no time for all of the {self._plan.num_kills} kills")
                break
            getattr(self, f"_kill_{kind}")()
        self._finish()
        self._report()

    def close(self) -> None:
        self._driver.end()
        self._cluster.close()

    @property
    def _output(self) -> str:
        return f"s3://{BUCKET}/round-{self._round}"

    def _start_build(self) -> None:
        self._driver.start(build_command(self._list, self._output, self._cluster.address))

    def _look_after_driver(self) -> None:
        """A build that is done is compared, and the next begins; one that stopped is started again."""
        status = self._driver.status()
        if status is None:
            return
        if status == 0:
            self._compare()
            self._round += 1
        else:
            self._num_stops += 1
            self._diary.note("the build stopped", status=status, said=self._driver.said())
        self._start_build()

    def _kill_driver(self) -> None:
        self._diary.kill("build", "driver", self._driver.pid)
        self._driver.wait(STOP_PATIENCE_S)
        self._start_build()

    def _kill_worker(self) -> None:
        while workers := self._busy_workers():
            worker = self._draw.choice(workers)
            with suppress(psutil.Error, ProcessLookupError, IndexError):  # it has just ended: another
                self._diary.kill("build", "worker", worker.pid, title=worker.cmdline()[0])
                return

    def _busy_workers(self) -> list[psutil.Process]:
        """Waits until there are some."""
        deadline = time.monotonic() + WORKER_PATIENCE_S
        while not (workers := self._cluster.busy_workers()) and time.monotonic() < deadline:
            self._look_after_driver()
            time.sleep(POLL_S)
        self._figures.promise(bool(workers), f"build: no worker was busy for {WORKER_PATIENCE_S:g} s")
        return workers

    def _kill_raylet(self) -> None:
        raylets = self._cluster.raylets()
        self._diary.kill("build", "raylet", self._draw.choice(raylets).pid)
        pause(self._draw, JOIN_S, self._deadline)
        self._cluster.forget_dead()
        self._cluster.add_node()
        self._diary.note("a node joins")

    def _kill_s3(self) -> None:
        self._server.kill()
        self._diary.count("build", "s3")
        pause(self._draw, DOWN_S, self._deadline)
        self._server.start()
        self._diary.note("the S3 server is back")

    def _kill_head(self) -> None:
        """The cluster is gone for good: the command must say so soon, and go on with another cluster."""
        self._busy_workers()  # one that still starts would find no cluster, and be right to say so
        self._diary.kill("build", "head", self._cluster.gcs().pid)
        killed = time.monotonic()
        status = self._driver.wait(STOP_PATIENCE_S)
        self._diary.note("after the head's death", status=status, seconds=round(time.monotonic() - killed, 1))
        self._figures.promise(status is not None, "build: the command hung on a dead cluster")
        self._figures.promise(status in (0, 1), f"build: it ended with {status} when the cluster died")
        self._driver.end()
        self._cluster.close()
        self._cluster.start()
        self._start_build()

    def _finish(self) -> None:
        """Let the last build end."""
        while (status := self._driver.wait(self._deadline - time.monotonic())) not in (0, None):
            self._look_after_driver()
        self._figures.promise(status == 0, "build: the last build did not end in time")
        if status == 0:
            self._compare()

    def _compare(self) -> None:
        found = audit(self._server.environment, self._output, self._reference, self._list)
        self._lost += found.num_lost
        self._duplicated += found.num_duplicated
        self._differing += found.differing
        self._diary.note("compared", round=self._round, **vars(found))

    def _report(self) -> None:
        figures, diary = self._figures, self._diary
        figures.set("faults.build.kills", diary.num_kills("build"))
        for kind in KINDS:
            figures.set(f"faults.build.kills.{kind}", diary.kills[f"build.{kind}"])
        figures.set("faults.build.rounds", self._round + 1, "builds")
        figures.set("faults.build.stops", self._num_stops)
        figures.set("faults.build.lost", self._lost, "rows")
        figures.set("faults.build.duplicated", self._duplicated, "rows")
        figures.set("faults.build.identical", not self._differing)
        figures.set("faults.build.store_errors", self._proxy.injected.total())
        figures.promise(not self._lost, f"build: {self._lost} rows were lost")
        figures.promise(not self._duplicated, f"build: {self._duplicated} rows came twice")
        figures.promise(not self._differing, f"build: other bytes in {', '.join(self._differing[:3])}")
        figures.promise(not self._num_stops, f"build: it stopped {self._num_stops} times, and nobody had killed it")
