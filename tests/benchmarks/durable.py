"""`make bench-durable`: what it costs to write a build to an object store instead of a local disk.

The same list is built into a folder and into a bucket of a real S3 server (SeaweedFS) on this machine, in turns, on two
workers. Then once more without Ray, to count what is asked of the store. Takes about two minutes on two idle cores.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from photos import make_photos
from static_web import StaticWeb, serve_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from s3_server import BUCKET, s3_server

NUM_PHOTOS, NUM_ROWS, NUM_TURNS = 100, 3_000, 3
ROWS_PER_UNIT, SAMPLES_PER_SHARD = 500, 1_000
BUILD_S = 300.0


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end as well
    with tempfile.TemporaryDirectory(prefix="durable") as name:
        folder = Path(name)
        make_photos(folder / "www", NUM_PHOTOS, seed=0)
        with serve_folder(folder / "www", folder / "web") as web, s3_server(folder / "s3") as server:
            os.environ |= server.environment
            write_list(folder / "list.csv", web)
            compare(folder)


def write_list(path: Path, web: StaticWeb) -> None:
    """Every photo under many addresses: the server's disk cache is no part of this."""
    names = (f"{number % NUM_PHOTOS:05}.jpg" for number in range(NUM_ROWS))
    rows = (f"{web.url('http', number, name)}?{number},picture {number}" for number, name in enumerate(names))
    path.write_text("\n".join(["url,caption", *rows]) + "\n")


def compare(folder: Path) -> None:
    stages: dict[str, list[float]] = {"local": [], "s3": []}
    commands: dict[str, list[float]] = {"local": [], "s3": []}
    for turn in range(NUM_TURNS):
        for place in ("local", "s3"):
            output = str(folder / f"out{turn}") if place == "local" else f"s3://{BUCKET}/out{turn}"
            started = time.monotonic()
            build(words(folder, output, "ray.num_cpus=2"))
            commands[place].append(time.monotonic() - started)
            stages[place].append(stages_s(output))
            took = f"stages {stages[place][-1]:.1f} s, command {commands[place][-1]:.1f} s"
            print(f"# {place} {turn}: {took}", flush=True)
    local_s, s3_s = (statistics.median(stages[place]) for place in ("local", "s3"))
    print(f"durable.local_s: {local_s:.2f} s")
    print(f"durable.s3_s: {s3_s:.2f} s")
    print(f"durable.overhead_ratio: {s3_s / local_s:.3f} ratio")
    command_s = {place: statistics.median(values) for place, values in commands.items()}
    print(f"durable.command_overhead_ratio: {command_s['s3'] / command_s['local']:.3f} ratio")
    requests, written, read = count_requests(words(folder, f"s3://{BUCKET}/counted", "ray.address=inline"))
    for method, number in requests.most_common():
        print(f"durable.requests.{method}: {number} requests")
    print(f"durable.requests: {requests.total()} requests")
    print(f"durable.requests_per_1000_rows: {requests.total() * 1000 / NUM_ROWS:.1f} requests")
    print(f"durable.written: {written / 2**20:.1f} MiB")
    print(f"durable.read: {read / 2**20:.1f} MiB")


def words(folder: Path, output: str, *more: str) -> list[str]:
    return [
        f"input={folder / 'list.csv'}",
        f"output={output}",
        "fetch.allow_private_addresses=true",
        "fetch.contact=bench@example.org",
        "dedup.exact=false",
        f"plan.rows_per_unit={ROWS_PER_UNIT}",
        f"pack.samples_per_shard={SAMPLES_PER_SHARD}",
        *more,
    ]


def build(arguments: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "pipeline", "build", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert done.returncode == 0, done.stderr


def stages_s(output: str) -> float:
    """What the stages took, without the start of Python and Ray and without the report's pictures."""
    from cluster.store import Store

    return sum(float(entry["wall_s"]) for entry in json.loads(Store(output).read_bytes("report/timings.json")))


def count_requests(arguments: list[str]) -> tuple[Counter[str], int, int]:
    """(requests by kind, bytes written, bytes read) of one build in this process."""
    from pipeline.__main__ import main as pipeline

    with counted() as (requests, sizes):
        assert pipeline(["build", *arguments]) == 0
    return requests, sizes["written"], sizes["read"]


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Counts what s3fs asks of the store: by operation, and the bytes of bodies."""
    from s3fs import S3FileSystem

    requests, sizes = Counter[str](), Counter[str]()
    call = S3FileSystem._call_s3

    async def counting(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        requests[method] += 1
        body = kwargs.get("Body")
        sizes["written"] += len(body) if isinstance(body, bytes | bytearray | memoryview) else 0
        answer = await call(self, method, *args, **kwargs)
        if method == "get_object":
            sizes["read"] += int(answer.get("ContentLength", 0))
        return answer

    S3FileSystem._call_s3 = counting
    try:
        yield requests, sizes
    finally:
        S3FileSystem._call_s3 = call


if __name__ == "__main__":
    main()
