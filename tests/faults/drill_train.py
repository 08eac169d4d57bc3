"""`pairmill train` on two ranks, checkpoints to S3, while ranks, the command and the store are killed."""

import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import store_proxy
from drill_build import Driver
from kills import Diary, Figures, pause, plan_kills
from raylets import RayCluster
from s3_server import BUCKET, S3Server, s3_server
from store_proxy import StoreProxy

from cluster.store import Store
from training.metrics import read_lines, read_progress

KINDS = {"rank": 0.6, "driver": 0.25, "s3": 0.15}
NUM_STEPS, EVERY_STEPS = 90, 20
MOMENT_STEPS, MOMENT_S, DOWN_S = 30, (0.0, 1.5), (0.2, 6.0)
EARLY_SHARE, EARLY_S = 0.2, (2.0, 12.0)
PATIENCE_S, POLL_S = 120.0, 0.2
FAULTS = {name: chance / 2 for name, chance in store_proxy.FAULTS.items()}
END_SHARE = 0.2
"""Of the time, for the last run to end after the last kill."""
TOLERANCE = 1e-4
"""Largest relative difference of a loss when the number of ranks changes: sums in another order, in fp32."""
SETTINGS = (
    "model.embed_dim=32",
    "model.vision={width: 64, depth: 3, heads: 2, image_size: 48, patch_size: 8}",
    "model.text={width: 48, depth: 2, heads: 2, context_length: 16, vocabulary: compact}",
    f"train.num_steps={NUM_STEPS}",
    "train.batch_size=64",
    "train.num_threads=1",
    "train.precision=fp32",
    "train.max_restarts=50",
    "optim.lr=1e-3",
    "optim.warmup_steps=5",
    f"checkpoint.every_steps={EVERY_STEPS}",
    "checkpoint.keep=3",
    "log.every_steps=1",
)


def train_command(dataset: Path, output: str | Path, address: str, num_ranks: int) -> list[str]:
    words = [f"data.dataset={dataset}", f"output={output}", f"ray.address={address}", f"train.num_ranks={num_ranks}"]
    return [sys.executable, "-P", "-m", "training", "train", *SETTINGS, *words]


@dataclass(frozen=True, kw_only=True)
class TrainDrill:
    """`num_kills` kills at random steps of short runs, and two runs that change their number of ranks."""

    seed: int
    num_kills: int
    limit_s: float = 420.0

    def run(self, folder: Path, dataset: Path, diary: Diary, figures: Figures) -> None:
        """dataset: of some hundred pictures, on a local disk."""
        with ExitStack() as stack:
            server = stack.enter_context(s3_server(folder / "s3"))
            proxy = stack.enter_context(StoreProxy(server.endpoint_url, self.seed, FAULTS))
            course = _Course(self, folder, server, proxy, dataset, diary, figures)
            stack.callback(course.close)
            course.run()


class _Course:
    """One run of the drill."""

    def __init__(
        self,
        plan: TrainDrill,
        folder: Path,
        server: S3Server,
        proxy: StoreProxy,
        dataset: Path,
        diary: Diary,
        figures: Figures,
    ) -> None:
        self._plan, self._folder, self._server, self._dataset = plan, folder, server, dataset
        self._diary, self._figures, self._proxy = diary, figures, proxy
        self._deadline = time.monotonic() + plan.limit_s
        self._last_kill = self._deadline - END_SHARE * plan.limit_s
        self._draw = random.Random(plan.seed + 1)
        store = server.environment | {"AWS_ENDPOINT_URL": proxy.url, "OMP_NUM_THREADS": "1"}
        self._cluster = RayCluster(folder / "ray", store)
        self._driver = Driver(self._cluster.driver_environment(), diary.folder / "train.log")
        self._output, self._num_ranks, self._round, self._num_stops = "", 2, 0, 0
        self._expected: list[Any] = []
        self._differing: list[str] = []
        self._num_compared = 0

    def run(self) -> None:
        os.environ.update(self._server.environment)  # we ourselves look past the proxy
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        self._cluster.start()
        self._expected = self._undisturbed()
        largest = [self._elastic(2, 1), self._elastic(1, 2)]
        self._begin_round()
        for kind in plan_kills(self._draw, self._plan.num_kills - self._diary.num_kills("train"), KINDS):
            if not self._await_moment():
                self._figures.promise(False, f"train: no time for all of the {self._plan.num_kills} kills")
                break
            getattr(self, f"_kill_{kind}")()
        self._end_round()
        self._report(max((each for each in largest if each is not None), default=None))

    def close(self) -> None:
        self._driver.end()
        self._cluster.close()

    def _undisturbed(self) -> list[Any]:
        output = self._folder / "undisturbed"
        self._start(str(output), 2)
        status = self._driver.wait(self._deadline - time.monotonic())
        assert status == 0, f"the undisturbed run ended with {status}: {self._driver.said()}"
        losses = losses_of(Store(str(output)), 2)
        self._diary.note("undisturbed run", steps=len(losses))
        return losses

    def _elastic(self, before: int, after: int) -> float | None:
        """The largest relative difference of a loss, of a run that is killed and goes on with other ranks."""
        self._start(f"s3://{BUCKET}/from-{before}-to-{after}", before)
        at_step = self._draw.randrange(NUM_STEPS // 4, NUM_STEPS // 2)
        if not self._await(lambda: self._done_steps() >= at_step and self._has_checkpoint()):
            self._figures.promise(False, f"train: the run with {before} ranks came to no step {at_step}")
            return None
        self._kill_driver(after)
        if not self._finish():
            return None
        losses = losses_of(Store(self._output), 1)
        pairs = list(zip(losses, self._expected, strict=False))
        self._figures.promise(len(pairs) == NUM_STEPS, f"train: {len(losses)} steps from {before} to {after} ranks")
        largest = max(abs(ours[0] - theirs[0]) / abs(theirs[0]) for ours, theirs in pairs)
        self._diary.note("compared", ranks=f"{before} to {after}", at_step=at_step, max_diff=largest)
        return largest

    def _start(self, output: str, num_ranks: int) -> None:
        self._output, self._num_ranks = output, num_ranks
        self._driver.start(train_command(self._dataset, output, self._cluster.address, num_ranks))

    def _begin_round(self) -> None:
        self._start(f"s3://{BUCKET}/round-{self._round}", 2)

    def _end_round(self) -> None:
        if not self._finish():
            return
        for rank, losses in enumerate(zip(*losses_of(Store(self._output), 2), strict=True)):
            expected = [step[rank] for step in self._expected]
            if (found := list(losses)) != expected:
                first = next(
                    (step for step, pair in enumerate(zip(found, expected, strict=False)) if len(set(pair)) > 1), -1
                )
                self._differing.append(f"round {self._round} rank {rank} from step {first}")
        self._num_compared += 1
        self._diary.note("compared", round=self._round, differing=self._differing)

    def _finish(self) -> bool:
        """Whether the run has come to its end in time; one that stopped by itself is started again."""
        while (status := self._driver.wait(self._deadline - time.monotonic())) not in (0, None):
            self._stopped(status)
        self._figures.promise(status == 0, f"train: {self._output} did not end in time")
        return status == 0

    def _look_after_driver(self) -> None:
        """A run that is done is compared, and the next begins; one that stopped is started again."""
        if (status := self._driver.status()) == 0:
            self._end_round()
            self._round += 1
            self._begin_round()
        elif status is not None:
            self._stopped(status)

    def _stopped(self, status: int | None) -> None:
        self._num_stops += 1
        self._diary.note("the training stopped", status=status, said=self._driver.said())
        time.sleep(1)
        self._start(self._output, self._num_ranks)

    def _await_moment(self) -> bool:
        """Wait for a random step of the group that runs now; sometimes just for some seconds, in mid-start."""
        if self._draw.random() < EARLY_SHARE:
            pause(self._draw, EARLY_S, self._last_kill)
            return time.monotonic() < self._last_kill
        steps, began = self._draw.randrange(1, MOMENT_STEPS), time.time()

        def is_there() -> bool:
            self._look_after_driver()
            newest = self._progress()
            if newest.get("written", 0) <= began:
                return False
            return newest["resumed_at"] + steps <= newest["done_steps"] < NUM_STEPS

        found = self._await(is_there, self._last_kill)
        pause(self._draw, MOMENT_S, self._last_kill)
        return found

    def _await(self, condition: Callable[[], bool], deadline: float | None = None) -> bool:
        deadline = min(deadline or self._deadline, time.monotonic() + PATIENCE_S)
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(POLL_S)
        return False

    def _progress(self) -> dict[str, Any]:
        with suppress(Exception):  # the store may be on its way up
            return read_progress(Store(self._output)) or {}
        return {}

    def _has_checkpoint(self) -> bool:
        with suppress(Exception):
            return any(entry.path.count("/") == 1 for entry in Store(self._output).find("checkpoints"))
        return False

    def _done_steps(self) -> int:
        return int(self._progress().get("done_steps", 0))

    def _kill_rank(self) -> None:
        def has_killed() -> bool:
            self._look_after_driver()
            ranks = self._cluster.busy_workers("ray::RayTrainWorker")
            if not ranks:
                return False
            steps = self._done_steps()
            with suppress(ProcessLookupError):  # it has just ended: another
                self._diary.kill("train", "rank", self._draw.choice(ranks).pid, steps=steps)
                return True
            return False

        self._figures.promise(self._await(has_killed), "train: no rank ran")

    def _kill_driver(self, num_ranks: int = 2) -> None:
        self._diary.kill("train", "driver", self._driver.pid, steps=self._done_steps())
        self._driver.wait(PATIENCE_S)
        self._start(self._output, num_ranks)

    def _kill_s3(self) -> None:
        steps = self._done_steps()
        self._server.kill()
        self._diary.count("train", "s3", steps=steps)
        pause(self._draw, DOWN_S, self._deadline)
        self._server.start()
        self._diary.note("the S3 server is back")

    def _report(self, largest: float | None) -> None:
        figures, diary = self._figures, self._diary
        figures.set("faults.train.kills", diary.num_kills("train"))
        for kind in KINDS:
            figures.set(f"faults.train.kills.{kind}", diary.kills[f"train.{kind}"])
        figures.set("faults.train.rounds", self._num_compared, "runs")
        figures.set("faults.train.stops", self._num_stops)
        figures.set("faults.train.bit_identical", bool(self._num_compared) and not self._differing)
        if largest is not None:
            figures.set("faults.train.elastic_max_diff", largest, "of the loss")
        figures.set("faults.train.store_errors", self._proxy.injected.total())
        figures.promise(not self._differing, f"train: other losses in {', '.join(self._differing)}")
        figures.promise(not self._num_stops, f"train: it stopped {self._num_stops} times, and nobody had killed it")
        figures.promise(
            largest is not None and largest <= TOLERANCE, f"train: losses differ by {largest} with other ranks"
        )


def losses_of(store: Store, num_ranks: int) -> list[tuple[float, ...]]:
    """The loss of every step, by rank. Raises AssertionError where a step is missing or was recorded twice."""
    by_rank = []
    for rank in range(num_ranks):
        lines = read_lines(store, rank)
        assert [line["step"] for line in lines] == list(range(NUM_STEPS)), f"{store.url}: rank {rank} lacks steps"
        by_rank.append([line["loss"] for line in lines])
    return list(zip(*by_rank, strict=True))
