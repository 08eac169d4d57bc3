"""A build whose list, journal and dataset are objects of a real S3 server gives what a build on a local disk gives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server

from cluster.journal import Journal
from cluster.store import Store
from pipeline.__main__ import main

PATIENCE_S = 90.0
Words = Callable[..., list[str]]


def published(url: str) -> dict[str, bytes]:
    """Every object of a dataset whose bytes are promised."""
    store = Store(url)
    paths = [entry.path for entry in store.find("shards")] + ["manifest.json"]
    return {path: store.read_bytes(path) for path in paths}


def start(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "pipeline", "build", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_dataset_on_s3_is_the_one_on_a_local_disk(
    s3: S3Server, words: Words, url_list: Path, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Store(f"s3://{BUCKET}/same")
    place.write_bytes("lists/list.csv", url_list.read_bytes())
    output = f"{place.url}/out"
    assert main(["build", *words(Path("unused"), f"input={place.url}/lists/list.csv", f"output={output}")]) == 0
    found, expected = published(output), published(str(dataset))
    assert found.keys() == expected.keys()
    for path in expected.keys() - {"manifest.json"}:
        assert found[path] == expected[path], path
    told = capfd.readouterr()
    kept = b"".join(Store(output).read_bytes(entry.path) for entry in Store(output).find())
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in told.out + told.err
        assert secret.encode() not in kept
    assert main(["verify", output]) == 0
    assert main(["build", *words(Path("unused"), f"input={place.url}/lists/list.csv", f"output={output}")]) == 0
    assert "already done" in capfd.readouterr().out


def test_two_operators_who_start_the_same_run_get_one_dataset(
    s3: S3Server, words: Words, url_list: Path, dataset: Path
) -> None:
    output = f"s3://{BUCKET}/two-operators"
    request = words(Path("unused"), f"output={output}")
    operators = [start(request), start(request)]
    said = [operator.communicate(timeout=PATIENCE_S)[0] for operator in operators]
    assert [operator.returncode for operator in operators] == [0, 0], said
    assert published(output) == published(str(dataset))


def test_another_request_for_the_same_place_is_refused_with_what_differs(
    s3: S3Server, words: Words, capfd: pytest.CaptureFixture[str]
) -> None:
    output = f"s3://{BUCKET}/taken"
    assert main(["build", *words(Path("unused"), f"output={output}")]) == 0
    before = published(output)
    assert main(["build", *words(Path("unused"), f"output={output}", "image.quality=80")]) == 2
    assert "image.quality" in capfd.readouterr().err
    assert published(output) == before


def test_a_build_on_s3_that_is_killed_goes_on_and_ends_alike(
    s3: S3Server, words: Words, dataset: Path, site: Any, tmp_path: Path
) -> None:
    output = f"s3://{BUCKET}/killed"
    request = words(Path("unused"), f"output={output}")
    journal, site.delay_s = Journal(Store(output)), 0.3
    try:
        build = start(request)
        deadline = time.monotonic() + PATIENCE_S
        while len(journal.markers("fetch")) < 2 and build.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(build.pid, signal.SIGKILL)
        build.communicate()
    finally:
        site.delay_s = 0.0
    done = journal.markers("fetch")
    assert 2 <= len(done) < 6
    assert main(["build", *request]) == 0
    assert {unit: journal.markers("fetch")[unit].attempt for unit in done} == {
        unit: marker.attempt for unit, marker in done.items()
    }
    assert published(output) == published(str(dataset))


def test_a_build_without_access_says_what_to_do_and_makes_nothing(
    s3: S3Server, words: Words, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    build = start(words(Path("unused"), f"output=s3://{BUCKET}/no-access"))
    said = build.communicate(timeout=PATIENCE_S)[0]
    assert build.returncode == 2, said
    assert "access refused" in said
    assert "Traceback" not in said
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert Store(f"s3://{BUCKET}/no-access").find() == []


def test_damage_on_s3_is_named_and_made_again(
    s3: S3Server, words: Words, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = f"s3://{BUCKET}/damaged"
    assert main(["build", *words(Path("unused"), f"output={output}")]) == 0
    store = Store(output)
    data = bytearray(store.read_bytes("shards/00000.tar"))
    data[len(data) // 2] ^= 1
    store.write_bytes("shards/00000.tar", bytes(data))
    store.remove("shards/00001.parquet")
    store.remove("journal/fetch/00000-00002.json")
    capfd.readouterr()
    assert main(["verify", output]) == 1
    assert main(["verify", output, "--repair"]) == 0
    told = capfd.readouterr().out
    for path in ("shards/00000.tar", "shards/00001.parquet", "journal/fetch/00000-00002.json"):
        assert told.count(f"{output}/{path}: ") == 2
    assert published(output) == published(str(dataset))
