"""What only an object store does: it refuses, goes away, comes back, and loses answers."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from s3_server import BUCKET, S3Server, s3_server

from cluster import remote
from cluster.errors import RequestError, RunError
from cluster.store import Store


def test_what_another_process_writes_is_seen_at_once(s3: S3Server) -> None:
    store = Store(f"s3://{BUCKET}/listings")
    store.write_bytes("a", b"1")
    assert [entry.path for entry in store.find()] == ["a"]
    code = f"from cluster.store import Store; Store({store.url!r}).write_bytes('b', b'2')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [entry.path for entry in store.find()] == ["a", "b"]


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(s3: S3Server, tmp_path: Path) -> None:
    store, made = Store(f"s3://{BUCKET}/large"), tmp_path / "made"
    content = bytes(range(256)) * (60 * 2**20 // 256)  # above the 50 MB from which s3fs uploads in parts
    made.write_bytes(content)
    store.put_file(made, "images.tar")
    assert store.size_bytes("images.tar") == len(content)
    assert store.read_range("images.tar", 55 * 2**20 + 1, 3) == bytes([1, 2, 3])
    store.get_file("images.tar", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_wrong_keys_are_refused_with_what_to_do(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(RunError, match=r"s3://pairmill/wrong/a: access refused .* credentials"):
        Store(f"s3://{BUCKET}/wrong").write_bytes("a", b"1")


def test_a_bucket_that_is_not_there_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("s3://no-such-bucket/run")

    def no_such_bucket(*args: object, **kwargs: object) -> None:  # this server would make it
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(store._fs, "pipe_file", no_such_bucket)
    with pytest.raises(RunError, match=r"s3://no-such-bucket/run/a: cannot be written: .* make the bucket first"):
        store.write_bytes("a", b"1")


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(RequestError, match="credentials in a URL") as refusal:
        Store("s3://key:secret@bucket/run")
    assert "secret" not in str(refusal.value)


def test_a_writer_whose_answer_was_lost_knows_that_it_won(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"s3://{BUCKET}/lost-answer")
    put, lost = store._fs.pipe_file, []

    def put_and_lose_the_answer(*args: object, **kwargs: object) -> None:
        put(*args, **kwargs)
        if not lost:
            lost.append(True)
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(store._fs, "pipe_file", put_and_lose_the_answer)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    assert store.create("marker.json", b"mine") is True
    assert lost
    assert store.create("marker.json", b"another's") is False


def test_a_store_that_is_killed_and_comes_back_costs_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        store = Store(f"s3://{BUCKET}/run")
        store.write_bytes("before", b"1")
        server.kill()
        again = threading.Timer(1.0, server.start)
        again.start()
        store.write_bytes("after", b"2")
        again.join()
        assert (store.read_bytes("before"), store.read_bytes("after")) == (b"1", b"2")


def test_a_store_that_stays_away_stops_the_run_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.2)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.05)

    def away(path: str) -> None:
        raise ConnectionRefusedError(f"no answer for {path}")

    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"s3://b/a: the store has not answered properly for 0 s .* run the same command"
    ):
        remote.call("s3://b/a", away, "a")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("error", [FileNotFoundError("x"), FileExistsError("x"), ValueError("x")])
def test_answers_and_mistakes_are_not_repeated(error: Exception) -> None:
    calls = []

    def answer() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        remote.call("s3://b/a", answer)
    assert len(calls) == 1
