"""`make bench-fetch`: pairmill's fetch stage against img2dataset 1.47.0, in turns, on the same photos and two cores.

    python tests/benchmarks/fetch.py [--count 4000] [--rounds 3] [--only http.fast] [--work FOLDER]

A round runs every client once, one after the other, each in processes of its own with two workers, and the codec alone.
Printed are the medians over the rounds; ratios are taken inside each round. Clients and web server share two cores, so
beside the rates the CPU time of each client (all its processes, Ray's too, but not the server) is told.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from codec import psnr_db, rates_alone
from meter import TreeMeter
from photos import make_photos
from static_web import StaticWeb, serve_folder

SEED = 20_261_122
DISTINCT_PHOTOS = 500
WARM_UP_ROWS = 16
NUM_CORES = 2
PSNR_PHOTOS = 100
CLIENT_TIMEOUT_S = 240
PEER_THREADS = {"http": 16, "https": 32}
"""img2dataset's thread_count, tuned on this benchmark; docs/benchmarks.md has the rates of others."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """What one turn runs. mode: pairmill's `image.mode`, or None for img2dataset."""

    scheme: str
    mode: str | None

    @property
    def name(self) -> str:
        return f"{self.scheme}.{self.mode or 'img2dataset'}"


MODES = ("exact", "fast")
CLIENTS = (
    Client(scheme="http", mode=None),
    Client(scheme="http", mode="exact"),
    Client(scheme="http", mode="fast"),
    Client(scheme="https", mode=None),
    Client(scheme="https", mode="fast"),
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn of one client took."""

    images_per_s: float
    images_per_cpu_s: float
    worker_ms: float
    """CPU time of an image in the processes that download and decode."""
    other_ms: float
    """CPU time of an image in all others: Ray's services, the driver, img2dataset's logger."""
    server_share: float
    """Of the two cores' time."""
    peak_rss_mib: float
    """The largest worker: a process that downloads, and those that decode for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4_000, help="photos downloaded by each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help=f"clients: {', '.join(client.name for client in CLIENTS)}")
    parser.add_argument("--set", action="append", default=[], help="further settings of pairmill, such as fetch.x=1")
    parser.add_argument("--threads", type=int, help="img2dataset's thread_count, if not the tuned one")
    parser.add_argument("--codec-photos", type=int, default=DISTINCT_PHOTOS, help="for the codecs alone, in a round")
    parser.add_argument("--work", type=Path, help="where photos are kept for the next time; else a temporary folder")
    arguments = parser.parse_args()
    clients = [client for client in CLIENTS if not arguments.only or client.name in arguments.only]
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fetch-")))
        photos = photo_folder(work.resolve() / "photos", min(DISTINCT_PHOTOS, arguments.count))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fetch-", dir="/tmp")))
        web = stack.enter_context(serve_folder(photos[0].parent, scratch / "web"))
        kind = f"{mean_bytes(photos) / 1e3:.0f} KB, {len(photos)} of them distinct"
        print(f"# {arguments.count} photos of {kind}; server: {web.name}", flush=True)
        bench = Bench(web=web, photos=photos, scratch=scratch, arguments=arguments)
        rounds, codecs = [], []
        for _ in range(arguments.rounds):
            rounds.append({client.name: bench.turn(client) for client in clients})
            codecs.append(rates_alone(photos[0].parent, arguments.codec_photos, NUM_CORES))
        report(rounds)
        report_codec(rounds, codecs)
        print(f"fetch.fast.psnr_db: {psnr_db(photos[:PSNR_PHOTOS], 'fast'):.2f} dB, resized pixels against mode exact")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all turns share."""

    web: StaticWeb
    photos: Sequence[Path]
    scratch: Path
    arguments: argparse.Namespace

    def turn(self, client: Client) -> Turn:
        """Run a client once in a process of its own and remove what it wrote."""
        folder = self.scratch / client.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        job = self._job(client, folder)
        (folder / "job.json").write_text(json.dumps(job))
        program = "pairmill" if client.mode else "img2dataset"
        command = [sys.executable, str(Path(__file__).parent / "clients.py"), program, str(folder / "job.json")]
        environment = os.environ | {
            "SSL_CERT_FILE": str(self.web.ca_bundle),
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "RAY_TMPDIR": str(self.scratch),
        }
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            worker = "ray::" if client.mode else "multiprocessing.spawn"
            with TreeMeter(pid=process.pid, worker=worker) as meter, TreeMeter(pid=self.web.pid) as server:
                status = process.wait(timeout=CLIENT_TIMEOUT_S)
        if status:
            raise SystemExit(f"{client.name} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
        result = json.loads(Path(job["result"]).read_text())
        count = self.arguments.count
        assert result["num_kept"] == count, f"{client.name} kept {result['num_kept']} of {count} photos"
        start, end = result["start"], result["end"]
        client_s, worker_s = meter.cpu_between(start, end), meter.worker_cpu_between(start, end)
        turn = Turn(
            images_per_s=count / (end - start),
            images_per_cpu_s=count / client_s,
            worker_ms=1e3 * worker_s / count,
            other_ms=1e3 * (client_s - worker_s) / count,
            server_share=server.cpu_between(start, end) / (end - start) / NUM_CORES,
            peak_rss_mib=meter.peak_worker_bytes / 2**20,
        )
        print(
            f"# {client.name}: {turn.images_per_s:.0f} images/s, {turn.images_per_cpu_s:.0f} per client CPU-second "
            f"({turn.worker_ms:.2f} ms in workers, {turn.other_ms:.2f} ms in others), "
            f"server {turn.server_share:.0%} of the cores, {turn.peak_rss_mib:.0f} MiB",
            flush=True,
        )
        return turn

    def _job(self, client: Client, folder: Path) -> dict[str, Any]:
        count = self.arguments.count
        settings = [
            f"ray.num_cpus={NUM_CORES}",
            "fetch.allow_private_addresses=true",
            "image.size=256",
            "image.resize=keep_ratio",
            "image.quality=95",
            f"image.mode={client.mode}",
            *self.arguments.set,
        ]
        (folder / "temporary").mkdir()
        return {
            "urls": str(self._url_list(folder / "urls.parquet", client.scheme, count, "photo")),
            "warm_up_urls": str(self._url_list(folder / "warm_up.parquet", client.scheme, WARM_UP_ROWS, "warm")),
            "output": str(folder / "output"),
            "result": str(folder / "result.json"),
            "temporary": str(folder / "temporary"),
            "rows_per_unit": -(-count // NUM_CORES),
            "threads": self.arguments.threads or PEER_THREADS[client.scheme],
            "settings": settings,
        }

    def _url_list(self, path: Path, scheme: str, count: int, name: str) -> Path:
        names = [self.photos[number % len(self.photos)].name for number in range(count)]
        urls = [self.web.url(scheme, number, f"{file}?{name}={number}") for number, file in enumerate(names)]
        captions = [f"photo number {number}" for number in range(count)]
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
        return path


def photo_folder(folder: Path, count: int) -> list[Path]:
    """`count` photos, made once."""
    made = sorted(folder.glob("*.jpg")) if folder.exists() else []
    return made[:count] if len(made) >= count else make_photos(folder, count, SEED)


def mean_bytes(photos: Sequence[Path]) -> float:
    return statistics.mean(photo.stat().st_size for photo in photos)


def report(rounds: Sequence[dict[str, Turn]]) -> None:
    """Rates of every client, and ratios where both sides ran."""
    for name in rounds[0]:
        turns = [turns[name] for turns in rounds]
        show(
            f"fetch.{name}.images_per_s",
            [turn.images_per_s for turn in turns],
            "images/s on two cores, server included",
        )
        show(
            f"fetch.{name}.images_per_cpu_s", [turn.images_per_cpu_s for turn in turns], "images per client CPU-second"
        )
        show(f"fetch.{name}.server_share", [turn.server_share for turn in turns], "of two cores", digits=3)
        show(f"fetch.{name}.peak_rss_mib", [turn.peak_rss_mib for turn in turns], "MiB in the largest worker")
        scheme, _, mode = name.partition(".")
        peer = f"{scheme}.img2dataset"
        if mode != "img2dataset" and peer in rounds[0]:
            wall = [turns[name].images_per_s / turns[peer].images_per_s for turns in rounds]
            cpu = [turns[name].images_per_cpu_s / turns[peer].images_per_cpu_s for turns in rounds]
            show(f"fetch.{name}.ratio_vs_img2dataset", wall, "x, images/s", digits=2)
            show(f"fetch.{name}.cpu_ratio_vs_img2dataset", cpu, "x, images per client CPU-second", digits=2)
    peaks = [max(turn.peak_rss_mib for name, turn in turns.items() if "img2dataset" not in name) for turns in rounds]
    show("fetch.peak_rss_mib", peaks, "MiB, pairmill's largest worker")


def report_codec(rounds: Sequence[dict[str, Turn]], codecs: Sequence[dict[str, float]]) -> None:
    """A client's images per second of its processors, over those of decoding, resizing and encoding alone.

    `codec_efficiency` is of the usual one, decode, INTER_AREA and encode with OpenCV: no change when our own
    codec becomes faster; `own_codec_efficiency` is of that one, in the client's mode: what everything else costs.
    """
    for name in codecs[0]:
        show(f"codec.{name}.images_per_cpu_s", [codec[name] for codec in codecs], "decode-resize-encode alone")
    for mode in MODES:
        if f"http.{mode}" not in rounds[0]:
            continue
        rates = [turns[f"http.{mode}"].images_per_cpu_s for turns in rounds]
        own, usual = (
            [rate / codec[name] for rate, codec in zip(rates, codecs, strict=True)] for name in (mode, "opencv")
        )
        show(f"fetch.{mode}.own_codec_efficiency", own, "of our own codec's rate a core", digits=3)
        show(f"fetch.{mode}.codec_efficiency", usual, "of the rate a core of the same with OpenCV", digits=3)
        if mode == "exact":  # the default
            show("fetch.codec_efficiency", usual, "of the rate a core of the same with OpenCV, mode exact", digits=3)


def show(name: str, values: Sequence[float], unit: str, digits: int = 0) -> None:
    """One figure: the median over the rounds, and their range."""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    print(f"{name}: {statistics.median(values):.{digits}f} {unit}{spread}", flush=True)


if __name__ == "__main__":
    main()
