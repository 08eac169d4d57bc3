"""`pairmill repair`: tries again what failed for the moment, adds what comes, touches nothing else; kill -9 is safe."""

import contextlib
import csv
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest

from cluster.journal import Journal
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.manifest import Manifest, read_manifest
from pipeline.verify import verify
from tests.pipeline.conftest import jpeg

PATIENCE_S = 60.0


@dataclass
class Web:
    """A server whose paths under /busy/ answer 503 until `is_well`, those under /worse/ until `is_very_well`."""

    url: str = ""
    is_well: bool = False
    is_very_well: bool = False
    delay_s: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)

    def answer(self, path: str) -> tuple[int, bytes]:
        kind, name = path.strip("/").split("/")
        is_there = {"busy": self.is_well, "worse": self.is_very_well, "image": True}.get(kind, False)
        if is_there:
            return 200, jpeg(name)
        if kind == "moved":
            return (404 if self.is_well else 503), b"gone"
        return (503, b"busy") if kind in ("busy", "worse") else (404, b"gone")


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    here = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            here.seen[self.path] += 1
            time.sleep(here.delay_s)
            status, body = here.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Quiet."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that were killed hang up in the middle of an answer."""

    server = Server(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


ROWS = (
    *(("image", f"n{number}") for number in range(13)),
    *(("busy", f"b{number}") for number in range(8)),
    ("busy", "n3"),  # the same picture as one that is in the dataset
    ("busy", "twin"),
    ("worse", "twin"),
    *(("worse", f"w{number}") for number in range(3)),
    ("moved", "m"),
    *(("gone", f"g{number}") for number in range(2)),
)
BEFORE = {"http_404": 2, "http_503": 15, "kept": 13}


@pytest.fixture(scope="module")
def original(server: Web, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build of a list half of which could not be had; tests take copies."""
    folder = tmp_path_factory.mktemp("repair")
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption", "rank"])
        writer.writerows(
            [f"{server.url}/{kind}/{name}", f"{kind} {name}", rank] for rank, (kind, name) in enumerate(ROWS)
        )
    assert main(["build", *words(folder, folder / "out")]) == 0
    assert manifest_of(folder / "out").counts == BEFORE
    return folder


def words(lists: Path, output: Path) -> list[str]:
    return [
        f"input={lists / 'list.csv'}",
        f"output={output}",
        "ray.address=inline",
        "fetch.allow_private_addresses=true",
        "fetch.backoff_s=0",
        "fetch.retries=0",
        "fetch.host_failures=1000",
        "plan.rows_per_unit=6",
        "pack.samples_per_shard=5",
    ]


@pytest.fixture
def web(server: Web) -> Web:
    """The server as it was during the build."""
    server.is_well = server.is_very_well = False
    server.delay_s = 0.0
    server.seen.clear()
    return server


@pytest.fixture
def built(web: Web, original: Path, tmp_path: Path) -> Path:
    """A copy of the finished build."""
    folder = tmp_path / "out"
    shutil.copytree(original / "out", folder)
    return folder


def manifest_of(folder: Path) -> Manifest:
    return read_manifest(str(folder))[1]


def published(folder: Path) -> dict[str, bytes]:
    files = [*sorted((folder / "shards").iterdir()), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def verdicts(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What the records say of every URL, but for what depends on the moment."""
    names = ["url", "status", "reason", "rule", "duplicate_of", "shard", "key", "generation", "sha256", "width", "rank"]
    rows = pyarrow.dataset.dataset(folder / "record").to_table(columns=names).to_pylist()
    return {row["url"]: tuple(row.values()) for row in rows}


def is_whole(folder: Path) -> bool:
    store, manifest = read_manifest(str(folder))
    return verify(store, manifest, decode=None) == []


def test_what_came_is_added_and_nothing_else_is_touched(
    web: Web, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.is_well = True
    shards = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (built / "shards").iterdir()}
    permanent = {path for path in (f"/{kind}/{name}" for kind, name in ROWS) if path.startswith(("/gone", "/image"))}
    assert main(["repair", str(built)]) == 0
    out = capsys.readouterr().out
    assert "tried again: 15 rows = http_503 15" in out
    assert "now: kept 9, http_503 4, duplicate_bytes 1, http_404 1" in out
    assert "left for another repair: 4 rows" in out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards} == shards
    assert not permanent & set(web.seen)
    manifest = manifest_of(built)
    assert manifest.counts == {"duplicate_bytes": 1, "http_404": 3, "http_503": 4, "kept": 22}
    assert [shard.num_samples for shard in manifest.shards] == [5, 5, 3, 5, 4]
    assert manifest.repairs[0]["before"] == {"http_503": 15}
    assert sum(manifest.repairs[0]["after"].values()) == 15
    assert is_whole(built)


def test_a_newcomer_never_displaces_a_sample(web: Web, built: Path) -> None:
    before = verdicts(built)
    web.is_well = True
    assert main(["repair", str(built)]) == 0
    after = verdicts(built)
    old, new = f"{web.url}/image/n3", f"{web.url}/busy/n3"
    assert after[old] == before[old]
    uid = next(row["uid"] for row in samples(built) if row["url"] == old)
    assert after[new][1:5] == ("dropped", "duplicate_bytes", "dedup.exact", uid)
    assert {url for url in after if after[url] != before[url]} == {f"{web.url}/{path}" for path in tried()}
    assert [row["url"] for row in samples(built)].count(new) == 0


def test_a_newcomer_that_looks_like_a_sample_is_its_duplicate(web: Web, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(["build", *words(original, folder), "dedup.exact=false", "dedup.near_distance=3"]) == 0
    web.is_well = True
    assert main(["repair", str(folder)]) == 0
    uid = next(row["uid"] for row in samples(folder) if row["url"] == f"{web.url}/image/n3")
    assert verdicts(folder)[f"{web.url}/busy/n3"][1:5] == ("dropped", "near_duplicate", "dedup.near_distance", uid)
    assert manifest_of(folder).num_samples == 22
    assert is_whole(folder)


def tried() -> list[str]:
    return [f"{kind}/{name}" for kind, name in ROWS if kind in ("busy", "worse", "moved")]


def samples(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "shards").glob("*.parquet"))
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(paths).to_table().to_pylist()
    return rows


def test_repairs_go_on_until_nothing_is_left(web: Web, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web.is_well = True
    assert main(["repair", str(built)]) == 0
    web.is_very_well = True
    web.seen.clear()
    assert main(["repair", str(built)]) == 0
    assert {path.split("/")[1] for path in web.seen} == {"worse"}
    manifest = manifest_of(built)
    # the twin came in the first repair, so this one is a duplicate over generations
    assert manifest.counts == {"duplicate_bytes": 2, "http_404": 3, "kept": 25}
    assert len(manifest.repairs) == 2
    assert is_whole(built)
    assert len({row["key"] for row in samples(built)}) == 25
    out = capsys.readouterr().out
    assert "left for another repair: 4 rows" in out
    assert "nothing is left to try again: the rest failed for good" in out
    before, requests = published(built), web.seen.total()
    assert main(["repair", str(built)]) == 0
    assert "nothing to repair: no pair failed for a reason that may pass" in capsys.readouterr().out
    assert published(built) == before
    assert web.seen.total() == requests


def test_a_repair_that_recovers_nothing_leaves_the_shards_as_they_are(web: Web, built: Path) -> None:
    before = published(built)
    assert main(["repair", str(built)]) == 0
    after = published(built)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert manifest_of(built).counts == BEFORE
    assert is_whole(built)


def test_a_repair_needs_nothing_of_work(web: Web, built: Path) -> None:
    web.is_well = True
    shutil.rmtree(built / "work")
    assert main(["repair", str(built)]) == 0
    assert manifest_of(built).num_samples == 22
    assert is_whole(built)


def test_explain_and_status_know_of_repairs(web: Web, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web.is_well = True
    assert main(["repair", str(built)]) == 0
    capsys.readouterr()
    assert main(["explain", str(built), f"{web.url}/busy/b1"]) == 0
    out = capsys.readouterr().out
    assert "repair      tried again by repair 1" in out
    assert "curate.blank_threshold" in out
    assert "result      kept: shards/0000" in out
    assert main(["explain", str(built), f"{web.url}/busy/n3"]) == 0
    assert "same bytes as uid" in capsys.readouterr().out
    assert main(["report", str(built)]) == 0


def test_a_removed_manifest_is_made_again_by_the_build(web: Web, original: Path, built: Path) -> None:
    web.is_well = True
    assert main(["repair", str(built)]) == 0
    before, record = published(built), verdicts(built)
    (built / "manifest.json").unlink()
    shutil.rmtree(built / "journal/repair-0001-pack")
    assert main(["build", *words(original, built)]) == 0
    assert published(built) == before
    assert verdicts(built) == record


# Of a dataset that was repaired: the file (a first one of several) that is damaged or removed.
DAMAGES = {
    "shard of the build": ("shards/00001.tar", True),
    "shard of the repair": ("shards/00003.tar", True),
    "record that the repair changed": ("record/00001.parquet", True),
    "images of the build": ("work/fetch/00000-00000.*/images.tar", True),
    "images of the repair": ("work/repair-0001-fetch/*/images.tar", True),
    "rows of the repair": ("work/repair-0001-fetch/*/rows.parquet", False),
    "decisions of the repair": ("work/repair-0001-decide/*/kept.npy", True),
    "verdicts of the repair": ("work/repair-0001-verdict/*/record.parquet", True),
    "plan of the repair": ("work/repair-0001-plan/*/rows.parquet", True),
    "marker of a plan": ("journal/repair-0001-plan/*.json", False),
    "marker of decisions": ("journal/repair-0001-decide/*.json", False),
    "marker of a shard": ("journal/repair-0001-pack/*.json", False),
    "marker of a download": ("journal/repair-0001-fetch/*.json", False),
    "marker of verdicts": ("journal/repair-0001-verdict/*.json", False),
    "marker of the build": ("journal/decide/*.json", False),
}


@pytest.fixture(scope="module")
def repaired(server: Web, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repaired") / "out"
    shutil.copytree(original / "out", folder)
    server.is_well = True
    assert main(["repair", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_to_a_repaired_dataset_is_named_and_made_again(
    web: Web, repaired: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    web.is_well = True
    pattern, is_all_back = DAMAGES[name]
    folder = tmp_path / "out"
    shutil.copytree(repaired, folder)
    path = sorted(folder.glob(pattern))[0]
    if path.suffix == ".json":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert main(["verify", str(folder), "--repair"]) == 0, capsys.readouterr().out
    assert f"{path}: " in capsys.readouterr().out
    assert published(folder) == published(repaired)
    assert verdicts(folder) == verdicts(repaired)
    assert is_whole(folder)
    if is_all_back:
        assert path.read_bytes() == (repaired / path.relative_to(folder)).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fetch.max_bytes=1"], "unknown key fetch.max_bytes"),
        (["fetch.retries=-1"], "fetch.retries"),
        (["seed=1"], "unknown key seed"),
    ],
)
def test_settings_that_would_change_results_are_refused(
    built: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    before = published(built)
    assert main(["repair", str(built), *settings]) == 2
    assert message in capsys.readouterr().err
    assert published(built) == before


def test_how_it_is_fetched_may_change(web: Web, built: Path) -> None:
    assert main(["repair", str(built), "fetch.retries=1"]) == 0
    assert set(web.seen.values()) == {2}


def test_an_unfinished_build_is_refused(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (built / "manifest.json").unlink()
    assert main(["repair", str(built)]) == 2
    error = capsys.readouterr().err
    assert "no finished dataset here" in error
    assert "pairmill build" in error


def test_a_dataset_of_another_version_is_refused(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = built / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["columns"]["sha256"]
    path.write_text(json.dumps(manifest))
    assert main(["repair", str(built)]) == 2
    assert "no column sha256" in capsys.readouterr().err


def start(folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline", "repair", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_when(folder: Path, condition: Callable[[], Any]) -> None:
    process = start(folder)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_at_any_stage_it_goes_on_to_the_same_bytes(web: Web, built: Path, tmp_path: Path) -> None:
    web.is_well = True
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(built, whole)
    shutil.copytree(built, folder)
    assert main(["repair", str(whole)]) == 0
    for stage in ("fetch", "pack", "record"):
        journal = folder / "journal" / f"repair-0001-{stage}"
        web.delay_s = 0.1 if stage == "fetch" else 0.0
        kill_when(folder, lambda journal=journal: list(journal.glob("*.json")))
        if not manifest_of(folder).repairs:
            assert manifest_of(folder).counts == BEFORE
            assert is_whole(folder)
    assert main(["repair", str(folder)]) == 0
    assert len(manifest_of(folder).repairs) == 1
    assert published(folder) == published(whole)
    assert verdicts(folder) == verdicts(whole)
    assert is_whole(folder)
    assert orphans(folder) == set()


def orphans(folder: Path) -> set[str]:
    journal = Journal(Store(str(folder)))
    stages = [path.name for path in (folder / "journal").iterdir() if path.is_dir()]
    named = {output.path for stage in stages for marker in journal.markers(stage).values() for output in marker.outputs}
    there = {str(path.relative_to(folder)) for path in (folder / "work").rglob("*") if path.is_file()}
    return there - named
