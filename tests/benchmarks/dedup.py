"""`make bench-dedup`: exact and near-duplicates at scale, on two cores with Ray; exact ones beside Ray Data.

Synthetic keys lie on disk as the decide stage leaves them: a file for every 2,000 rows, with the fields of `FACTS` that
the configured step needs, read with its sha256 checked. Measured is the step as a build runs it: all its stages with
their journal, to the files that the pack stage reads. Not measured: the decide stage, which makes the facts from
columns of the fetch stage's rows.

Of the rows 10 % have one and the same key, 10 % that of some other row; 5 % look like another row but for one to three
bits, half of them in a mirror. Ray Data gets the same 128-bit keys as two columns of integers in parquet, 64 bits of
the uids, and the least work that finds the kept rows: the smallest uid of each key, and how many rows there are. Both
have a Ray of their own in each round, with its workers warm.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from meter import TreeMeter
from numpy.typing import NDArray

from cluster.config import parse
from cluster.executor import RayExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.session import RayConfig, ray_session
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.curation.context import Context, Curated, Step
from pipeline.duplicates.exact import drop_exact
from pipeline.duplicates.facts import FACTS, HAS_BYTES, HAS_LOOK, needed_facts
from pipeline.duplicates.near import drop_near
from pipeline.selection import DecidedUnit, Drops, Groups
from pipeline.workfile import WorkFile

ROWS_PER_UNIT = 2_000
UNITS_PER_TASK = 250
SAMPLE_S = 0.5
ODD_COLUMNS = np.uint64(0x5555555555555555)
"""The bits of a perceptual hash that a mirror turns over."""

Words = NDArray[np.uint64]


def mixed(numbers: Words, salt: int) -> Words:
    """[N] pseudo-random 64-bit numbers, a function of each number alone (splitmix64)."""
    words = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt * 0xD1B54A32D192ED03 % 2**64)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def contents(rows: Words, num_rows: int) -> Words:
    """[N] a number for each row; rows whose bytes are the same have the same."""
    kind = mixed(rows, 1) % np.uint64(10)
    other = mixed(rows, 2) % np.uint64(num_rows)
    return np.where(kind == 0, np.uint64(0), np.where(kind == 1, other, rows))


def partners(rows: Words) -> tuple[NDArray[np.bool_], Words]:
    """([N] which rows look like another, [N] the number of that one): of twenty the second looks like the first."""
    return rows % np.uint64(20) == 1, rows - rows % np.uint64(20)


def looks(rows: Words) -> Words:
    """[N] perceptual hashes."""
    is_like, partner = partners(rows)
    draw = mixed(rows, 5)
    changes = np.zeros(len(rows), np.uint64)
    for number in range(3):
        bit = np.uint64(1) << ((draw >> np.uint64(8 * number)) % np.uint64(64))
        changes |= np.where(draw >> np.uint64(60) >= np.uint64(5 * number), bit, np.uint64(0))
    mirror = np.where(draw & np.uint64(1 << 32) != 0, ODD_COLUMNS, np.uint64(0))
    return np.where(is_like, telling(partner) ^ changes ^ mirror, telling(rows))


def telling(rows: Words) -> Words:
    """[N] random hashes of which, as of images', neither they nor their mirror images have few bits set."""
    hashes = mixed(rows, 4)
    for salt in (20, 21):
        fewest = np.minimum(np.bitwise_count(hashes), np.bitwise_count(hashes ^ ODD_COLUMNS))
        hashes = np.where(fewest < 19, mixed(rows, salt), hashes)
    return hashes


def facts_of_rows(first: int, end: int, num_rows: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Facts of these rows."""
    rows = np.arange(first, end, dtype=np.uint64)
    facts = np.zeros(len(rows), FACTS)
    facts["unit"], facts["row"] = rows // ROWS_PER_UNIT, rows % ROWS_PER_UNIT
    same = contents(rows, num_rows)
    for name, numbers, salt in (("uid", rows, 10), ("bytes", same, 12), ("url", rows, 14), ("caption", rows, 16)):
        facts[f"{name}_high"], facts[f"{name}_low"] = mixed(numbers, salt), mixed(numbers, salt + 1)
    facts["phash"] = looks(rows)
    facts["phash_mirror"] = facts["phash"] ^ ODD_COLUMNS
    facts["num_chars"], facts["flags"] = 50, HAS_BYTES | HAS_LOOK
    return facts[list(dtype.names or ())].astype(dtype)


def write_units(folder: str, first: int, end: int, num_rows: int, dtype: np.dtype[Any]) -> list[str]:
    """Write the facts of these units; returns their sha256."""
    hashes = []
    for unit in range(first, end):
        path = Path(folder) / path_of(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = facts_of_rows(unit * ROWS_PER_UNIT, min(num_rows, (unit + 1) * ROWS_PER_UNIT), num_rows, dtype)
        facts.tofile(path)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashes


def path_of(unit: int) -> str:
    return f"work/decide/{unit:06}.0/facts.bin"


def write_parquet(folder: str, first: int, end: int, num_rows: int) -> None:
    """Keys and uids of some rows as Ray Data reads them."""
    rows = np.arange(first, end, dtype=np.uint64)
    columns = {
        "key_high": mixed(contents(rows, num_rows), 12).view(np.int64),
        "key_low": mixed(contents(rows, num_rows), 13).view(np.int64),
        "uid": mixed(rows, 10).view(np.int64),
    }
    pq.write_table(pa.table(columns), f"{folder}/{first:010}.parquet")


@dataclass(kw_only=True)
class Memory:
    """The most memory of this process and all below it at any moment: what they share is counted once."""

    peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak_bytes = max(self.peak_bytes, total)


@contextmanager
def watched() -> Iterator[Memory]:
    memory = Memory()
    thread = threading.Thread(target=memory.watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        memory._stop.set()
        thread.join()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something took; cpu_s of this process and all below it, which other programs disturb less."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def new_ray() -> AbstractContextManager[Any]:
    """Two cores, and no worker that anything has left behind."""
    return ray_session(RayConfig(num_cpus=2))


def measured(work: Callable[[], Any]) -> tuple[Any, Cost]:
    """(what the work gives, what it takes)."""
    os.sync()  # else what it writes would wait for the input, which was written a moment ago
    with TreeMeter(pid=os.getpid(), interval_s=SAMPLE_S) as meter, watched() as memory:
        time.sleep(2 * SAMPLE_S)
        started = time.time()
        result = work()
        ended = time.time()
        time.sleep(2 * SAMPLE_S)
    return result, Cost(wall_s=ended - started, cpu_s=meter.cpu_between(started, ended), peak_bytes=memory.peak_bytes)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Facts of so many rows in a folder."""

    folder: Path
    num_rows: int
    config: BuildConfig
    curated: Curated

    @staticmethod
    def make(folder: Path, num_rows: int, *settings: str) -> "Dataset":
        config = parse(BuildConfig, ["input=a", f"output={folder}", "dedup.prefer=[uid]", *settings])
        dtype = needed_facts(config)
        num_units = -(-num_rows // ROWS_PER_UNIT)
        starts = range(0, num_units, UNITS_PER_TASK)
        with new_ray():
            write = ray.remote(write_units)
            tasks = [write.remote(str(folder), s, min(num_units, s + UNITS_PER_TASK), num_rows, dtype) for s in starts]
            hashes = [sha256 for part in ray.get(tasks) for sha256 in part]
        none = WorkFile(stage="fetch", unit="", path="", sha256="")
        units = tuple(
            DecidedUnit(
                index=index,
                id=f"{index:06}",
                rows=none,
                images=none,
                kept=none,
                decisions=none,
                facts=WorkFile(stage="decide", unit=f"{index:06}", path=path_of(index), sha256=sha256),
            )
            for index, sha256 in enumerate(hashes)
        )
        num_kept = tuple(min(ROWS_PER_UNIT, num_rows - index * ROWS_PER_UNIT) for index in range(num_units))
        curated = Curated(units=units, num_kept=num_kept, groups=Groups.of(num_kept), facts_dtype=dtype)
        return Dataset(folder=folder, num_rows=num_rows, config=config, curated=curated)

    def run(self, step: Step) -> tuple[Drops, Cost]:
        """(what a step of curation drops, what it takes), from the start each time."""
        store = Store(str(self.folder))
        for path in (self.folder / "journal", *self.folder.glob("work/[!d]*")):
            shutil.rmtree(path, ignore_errors=True)
        journal = Journal(store)

        def run(stage: Any) -> dict[str, Marker]:
            return run_stage(stage, journal, RayExecutor(is_local=True), Progress())

        context = Context(config=self.config, store=store, run_stage=run)
        with new_ray():
            warm(self)
            drops, cost = measured(lambda: step(context, self.curated))
        assert drops is not None
        return drops, cost

    def representatives(self, drops: Drops) -> Words:
        """[rows] the first word of the uid of the sample that stands for each row, which may be the row's own."""
        found = np.concatenate([mixed(rows, 10) for rows in chunks(self.num_rows)])
        store = Store(str(self.folder))
        for group in range(len(drops.groups)):
            dropped = drops.of_group(store, group)
            found[dropped["unit"].astype(np.int64) * ROWS_PER_UNIT + dropped["row"]] = dropped["uid_high"]
        return found


def chunks(num_rows: int) -> Iterator[Words]:
    """The numbers of all rows, some millions at a time."""
    for first in range(0, num_rows, 5_000_000):
        yield np.arange(first, min(num_rows, first + 5_000_000), dtype=np.uint64)


def bench_exact(data: Dataset) -> Cost:
    """What it takes; fails unless exactly the row with the smallest uid of every key is left."""
    drops, cost = data.run(drop_exact)
    smallest = np.full(data.num_rows, 2**64 - 1, np.uint64)
    for rows in chunks(data.num_rows):
        np.minimum.at(smallest, contents(rows, data.num_rows).astype(np.int64), mixed(rows, 10))
    found = data.representatives(drops)
    for rows in chunks(data.num_rows):
        expected = smallest[contents(rows, data.num_rows).astype(np.int64)]
        assert (found[rows[0] : rows[-1] + np.uint64(1)] == expected).all(), "the wrong rows were dropped"
    return cost


def bench_near(data: Dataset) -> tuple[Cost, float, int]:
    """(what it takes, share of the planted pairs that came together, how many rows were dropped beyond the planted)."""
    drops, cost = data.run(drop_near)
    found = data.representatives(drops)
    rows = np.arange(data.num_rows, dtype=np.uint64)
    is_like, partner = partners(rows)
    together = found[is_like] == found[partner[is_like].astype(np.int64)]
    num_dropped = int((found != mixed(rows, 10)).sum())
    return cost, float(together.mean()), num_dropped - int(is_like.sum())


def make_parquet(lists: Path, num_rows: int) -> None:
    """What `bench_ray_data` reads."""
    lists.mkdir(parents=True)
    step = max(1, num_rows // 20)
    with new_ray():
        write = ray.remote(write_parquet)
        ray.get([write.remote(str(lists), s, min(num_rows, s + step), num_rows) for s in range(0, num_rows, step)])


def bench_ray_data(lists: Path, num_rows: int) -> Cost:
    """What Ray Data takes for the smallest uid of every key."""
    import ray.data

    result = lists.with_name("result")
    shutil.rmtree(result, ignore_errors=True)

    def kept(read: str) -> ray.data.Dataset:
        groups = ray.data.read_parquet(read).groupby(["key_high", "key_low"])
        return groups.aggregate(ray.data.aggregate.Min("uid"), ray.data.aggregate.Count())

    with new_ray():
        ray.data.DataContext.get_current().enable_progress_bars = False
        kept(str(min(lists.iterdir()))).count()  # its workers start and import what they need
        _, cost = measured(lambda: kept(str(lists)).write_parquet(str(result)))
    rows = np.arange(num_rows, dtype=np.uint64)
    expected = len(np.unique(contents(rows, num_rows)))
    assert pq.ParquetDataset(str(result)).read(columns=["key_low"]).num_rows == expected
    return cost


def say(name: str, value: float, unit: str) -> None:
    print(f"{name}: {value:,.4g} {unit}" if value < 100 else f"{name}: {value:,.0f} {unit}", flush=True)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rows", type=int, default=10_000_000, help="of the comparison with Ray Data, and of near")
    words.add_argument("--large", type=int, default=100_000_000, help="of the large run of exact")
    words.add_argument("--rounds", type=int, default=3, help="of exact and Ray Data, in turns")
    words.add_argument("--only", default="ray_data,near,large", help="beside exact, some of these, with commas")
    words.add_argument(
        "--folder", help="where keys are written: 120 bytes a row; default: the folder for temporary files"
    )
    given = words.parse_args()
    wanted = given.only.split(",")
    top = Path(tempfile.mkdtemp(prefix="bench-dedup-", dir=given.folder))
    try:
        run(top, wanted, given.rows, given.large, given.rounds)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def say_speed(name: str, num_rows: int, cost: Cost) -> None:
    say(f"{name}.rows_per_s", num_rows / cost.wall_s, "rows/s")
    say(f"{name}.cpu", cost.cpu_s / num_rows * 1e6, "us/row")


def run(top: Path, wanted: list[str], num_rows: int, num_large: int, rounds: int) -> None:
    data = Dataset.make(top / "rows", num_rows)
    exact = compare(data, top, rounds if "ray_data" in wanted else 0)
    for folder in ("rows", "parquet", "result"):
        shutil.rmtree(top / folder, ignore_errors=True)
    if "near" in wanted:
        near, recall, beyond = bench_near(Dataset.make(top / "looks", num_rows, "dedup.near_distance=3"))
        shutil.rmtree(top / "looks")
        say_speed("dedup.near", num_rows, near)
        print(f"dedup.near.recall_3bit: {recall:.7g}")
        say("dedup.near.beyond_planted", beyond, "rows")
        say("dedup.near.peak_rss_gib", near.peak_bytes / 2**30, "GiB")
    if "large" in wanted:
        large = Dataset.make(top / "large", num_large)
        cost = bench_exact(large)
        name = f"dedup.exact.{num_large // 1_000_000}M"
        say_speed(name, num_large, cost)
        say(f"{name}.peak_rss_gib", cost.peak_bytes / 2**30, "GiB")
        say("dedup.exact.growth", cost.wall_s / exact.wall_s, "times")
        say("dedup.exact.cpu_growth", cost.cpu_s / exact.cpu_s, "times")


def compare(data: Dataset, top: Path, rounds: int) -> Cost:
    """The median of what exact takes, in turns with Ray Data."""
    ours, peers = [bench_exact(data)], list[Cost]()
    if rounds:
        make_parquet(top / "parquet", data.num_rows)
    for number in range(rounds):
        peers.append(bench_ray_data(top / "parquet", data.num_rows))
        if number:
            ours.append(bench_exact(data))
    middle = typical(ours)
    say_speed("dedup.exact", data.num_rows, middle)
    if peers:
        say_speed("dedup.ray_data", data.num_rows, typical(peers))
        ratios = [peer.wall_s / mine.wall_s for peer, mine in zip(peers, ours, strict=True)]
        say("dedup.exact.ratio_vs_ray_data", statistics.median(ratios), "times")
        print("dedup.exact.ratio_vs_ray_data.rounds: " + ", ".join(f"{ratio:.4g}" for ratio in ratios) + " times")
        ratios = [peer.cpu_s / mine.cpu_s for peer, mine in zip(peers, ours, strict=True)]
        say("dedup.exact.cpu_ratio_vs_ray_data", statistics.median(ratios), "times")
    return middle


def typical(costs: list[Cost]) -> Cost:
    """The one with the median of the times."""
    return sorted(costs, key=lambda cost: cost.wall_s)[len(costs) // 2]


def warm(data: Dataset) -> None:
    """Start Ray's two workers and have them import what the stages need."""

    def work(path: str) -> int:
        import pipeline.duplicates.near  # noqa: F401

        return len(Path(path).read_bytes())

    task: Callable[..., Any] = ray.remote(work)
    path = str(data.folder / path_of(0))
    ray.get([task.remote(path) for _ in range(4)])  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
