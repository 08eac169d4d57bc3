"""A fetch unit that kills its workers is done in parts, and only the row that does it is lost."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from cluster.executor import Executor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.session import RayConfig, ray_session
from cluster.store import Store
from pipeline.config import FetchConfig, ImageConfig
from pipeline.fetch import FetchStage
from pipeline.plan import PLANNED
from pipeline.selection import read_table

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file by name

OF_THE_CONTENT = ["uid", "status", "reason", "sha256", "width", "height", "phash", "image_size", "num_rows"]


class Poisoned(FetchStage):
    """Fetching a URL with the word `poison` ends the worker, as the system does when memory runs out."""

    def fetch_rows(self, planned: pa.Table, tar: Any) -> Any:
        if any("poison" in (url or "") for url in planned["url"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch_rows(planned, tar)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with ray_session(RayConfig(num_cpus=2)) as executor:
        yield executor


def plan(store: Store, urls: list[str]) -> str:
    rows = [
        {"uid": f"{n:032x}", "order": n, "url": url, "caption": f"picture {n}", "num_rows": 1 + n % 2}
        for n, url in enumerate(urls)
    ]
    path = Path(store.full("work/plan-order/00000.0/rows.parquet"))
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, PLANNED), path, row_group_size=len(urls))
    return "work/plan-order/00000.0/rows.parquet"


def run(stage: FetchStage, executor: Executor) -> Marker:
    (marker,) = run_stage(stage, Journal(stage.store), executor, Progress(Console(file=io.StringIO()))).values()  # type: ignore[arg-type]
    return marker


def stage_of(kind: type[FetchStage], store: Store, urls: list[str]) -> FetchStage:
    return kind(
        store=store,
        groups=(("00000-00000", plan(store, urls), 0),),
        fetch=FetchConfig(allow_private_addresses=True, decode_threads=1),
        image=ImageConfig(),
        num_cpus=1.0,
        memory_bytes=0,
    )


def content(store: Store, marker: Marker) -> tuple[list[dict[str, Any]], list[bytes | None]]:
    """What does not depend on the moment: the rows, and their images."""
    rows = read_table(store, marker.path_of("rows.parquet"))
    places = rows.select(["image_offset", "image_size"]).to_pylist()
    images = [
        store.read_range(marker.path_of("images.tar"), place["image_offset"], place["image_size"])
        if place["image_size"]
        else None
        for place in places
    ]
    return rows.select(OF_THE_CONTENT).to_pylist(), images


def test_only_the_row_that_kills_its_workers_is_lost(
    site: Any, executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.executor.MAX_KILLS", 2)
    urls = [f"{site.url}/image/p{n}" for n in range(4)]
    undisturbed = stage_of(Poisoned, Store(str(tmp_path / "whole")), urls)
    rows, images = content(undisturbed.store, run(undisturbed, executor))
    urls[2] = f"{site.url}/image/poison"
    stage = stage_of(Poisoned, Store(str(tmp_path / "parts")), urls)
    marker = run(stage, executor)
    found, pictures = content(stage.store, marker)
    assert found[2]["reason"] == "worker_killed"
    assert pictures[2] is None
    assert [row for n, row in enumerate(found) if n != 2] == [row for n, row in enumerate(rows) if n != 2]
    assert [data for n, data in enumerate(pictures) if n != 2] == [data for n, data in enumerate(images) if n != 2]
    assert (marker.counts["reason:worker_killed"], marker.counts["reason:ok"]) == (1, 5), "rows of the list"
    left = {entry.path.split("/")[1] for entry in stage.store.find("journal")}
    assert left == {"fetch.json", "fetch"}, "parts leave nothing behind"
    assert {entry.path for entry in stage.store.find("work/fetch")} == {output.path for output in marker.outputs}
