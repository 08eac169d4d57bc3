"""Every unit ends with one marker, whatever fails on the way, and a resumed stage runs only what is missing."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from rich.console import Console

from cluster.errors import RequestError, RunError
from cluster.executor import Executor, InlineExecutor, Unit, run_stage
from cluster.interrupt import catch_interrupts
from cluster.journal import Journal, UnitOutput
from cluster.progress import Progress
from cluster.session import RayConfig, ray_session
from cluster.store import Store

# Workers cannot import a test file by name: send its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Squares:
    """Writes n squared; `failing` units raise, a unit in `crashing` kills its worker the first time."""

    name = "squares"
    num_cpus = 1.0
    memory_bytes = 0

    def __init__(self, log: Path, failing: tuple[str, ...] = (), crashing: tuple[str, ...] = ()) -> None:
        self.log, self.failing, self.crashing = log, failing, crashing

    def units(self) -> list[Unit]:
        return [Unit(id=f"{n:05}", params={"n": n}) for n in range(3)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        first_time = not self.ran(unit.id)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{unit.id}\n")
        if unit.id in self.failing:
            raise ValueError("no square today")
        output.path("square.txt").write_text(str(unit.params["n"] ** 2), encoding="utf-8")
        if unit.id in self.crashing and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        output.count("rows", 1)

    def ran(self, unit_id: str) -> int:
        return self.log.read_text(encoding="utf-8").split().count(unit_id) if self.log.exists() else 0


def run(stage: Squares, journal: Journal, executor: Executor | None = None) -> list[str]:
    progress = Progress(Console(file=io.StringIO()))
    markers = run_stage(stage, journal, executor or InlineExecutor(), progress)
    return [journal.store.read_bytes(marker.path_of("square.txt")).decode() for marker in markers.values()]


def test_a_failing_unit_is_named_and_the_next_run_does_only_what_is_missing(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path / "run")))
    with pytest.raises(RunError, match="stage squares, unit 00001: ValueError: no square today"):
        run(Squares(tmp_path / "log", failing=("00001",)), journal)
    assert list(journal.markers("squares")) == ["00000"]
    assert run(Squares(tmp_path / "log"), journal) == ["0", "1", "4"]
    assert (tmp_path / "log").read_text().split() == ["00000", "00001", "00001", "00002"]


def test_a_finished_stage_runs_nothing(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path / "run")))
    stage = Squares(tmp_path / "log")
    run(stage, journal)
    assert run(stage, journal) == ["0", "1", "4"]
    assert stage.ran("00000") == 1


def test_the_first_attempt_to_commit_wins_and_the_loser_is_swept(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path / "run")))
    winners = []
    for content in ("first", "second"):
        with journal.attempt("s", "u") as output:
            output.path("out.txt").write_text(content)
            winners.append(journal.commit("s", "u", output))
    assert winners[0] == winners[1]
    assert journal.store.read_bytes(winners[0].path_of("out.txt")) == b"first"
    assert journal.sweep("s") == 1
    assert [entry.path for entry in journal.store.find("work")] == [winners[0].path_of("out.txt")]


def test_a_unit_that_another_run_did_first_and_swept_is_done(tmp_path: Path) -> None:
    """Two operators start the same build: the faster one ends the stage while the slower is still at work."""
    journal = Journal(Store(str(tmp_path / "run")))

    class Overtaken(Squares):
        def run(self, unit: Unit, output: UnitOutput) -> None:
            super().run(unit, output)
            if unit.id == "00002":
                other = Squares(tmp_path / "other")
                assert run(other, journal) == ["0", "1", "4"]

    assert run(Overtaken(tmp_path / "log"), journal) == ["0", "1", "4"]
    assert [entry.path for entry in journal.store.find("work") if ".tmp" in entry.path] == []


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path / "run")))
    run(Squares(tmp_path / "log"), journal)
    journal.store.write_bytes("journal/squares/00001.json", b"\0\0")
    with pytest.raises(RunError, match=r"journal/squares/00001\.json: damaged .*; remove it and run the same"):
        run(Squares(tmp_path / "log"), journal)
    journal.store.remove("journal/squares/00001.json")
    assert run(Squares(tmp_path / "log"), journal) == ["0", "1", "4"]


def test_an_attempt_that_fails_leaves_no_files(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path / "run")))

    def attempt_cut_short() -> None:
        with journal.attempt("s", "u") as output:
            output.path("half.tar").write_text("half")
            raise ValueError("cut short")

    with pytest.raises(ValueError, match="cut short"):
        attempt_cut_short()
    assert journal.store.find("work") == []
    assert journal.marker("s", "u") is None


def test_published_names_are_fixed(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path / "run")))
    with journal.attempt("pack", "00000") as output:
        output.path("shard.tar", publish_as="shards/00000.tar").write_bytes(b"tar")
        marker = journal.commit("pack", "00000", output)
    assert marker.path_of("shard.tar") == "shards/00000.tar"
    assert journal.store.read_bytes("shards/00000.tar") == b"tar"


def test_a_request_error_inside_a_unit_keeps_its_class(tmp_path: Path) -> None:
    class Refusing(Squares):
        def run(self, unit: Unit, output: UnitOutput) -> None:
            raise RequestError("column url is missing")

    with pytest.raises(RequestError, match="column url is missing"):
        run(Refusing(tmp_path / "log"), Journal(Store(str(tmp_path / "run"))))


def test_a_signal_whose_exception_a_c_library_swallowed_still_ends_the_stage(tmp_path: Path) -> None:
    class Swallowing(Squares):
        def run(self, unit: Unit, output: UnitOutput) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            super().run(unit, output)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    journal = Journal(Store(str(tmp_path / "run")))
    catch_interrupts()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Swallowing(tmp_path / "log"), journal)
    finally:
        catch_interrupts()  # forget the signal
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(journal.markers("squares")) == ["00000"], "what was done is kept, and no more was begun"


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    with ray_session(RayConfig(num_cpus=2)) as executor:
        yield executor


def test_on_ray_a_killed_worker_is_replaced_and_the_unit_done_once(tmp_path: Path, ray_executor: Executor) -> None:
    journal = Journal(Store(str(tmp_path / "run")))
    stage = Squares(tmp_path / "log", crashing=("00001",))
    assert run(stage, journal, ray_executor) == ["0", "1", "4"]
    assert stage.ran("00001") == 2
    leftovers = [entry.path for entry in journal.store.find("work") if ".tmp" in entry.path]
    assert leftovers == []


def test_on_ray_a_unit_that_always_kills_its_worker_ends_the_run_with_a_message(
    tmp_path: Path, ray_executor: Executor
) -> None:
    class Deadly(Squares):
        def ran(self, unit_id: str) -> int:
            return 0

    with pytest.raises(RunError, match="a Ray task failed and will not be tried again"):
        run(Deadly(tmp_path / "log", crashing=("00001",)), Journal(Store(str(tmp_path / "run"))), ray_executor)


def test_on_ray_a_task_that_fits_on_no_node_is_refused_instead_of_waiting(ray_executor: Executor) -> None:
    for num_cpus, memory_bytes in ((64, 0), (1, 2**50)):
        with pytest.raises(RunError, match=r"which no node has \(2 cores, .* MiB\)"):
            list(ray_executor.map_unordered(lambda n: n, [1], num_cpus=num_cpus, memory_bytes=memory_bytes))


def test_on_ray_a_failing_unit_is_named(tmp_path: Path, ray_executor: Executor) -> None:
    with pytest.raises(RunError, match="unit 00002: ValueError: no square today"):
        run(Squares(tmp_path / "log", failing=("00002",)), Journal(Store(str(tmp_path / "run"))), ray_executor)
