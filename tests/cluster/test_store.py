"""A store keeps the same promises on a local disk and on any other fsspec file system."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import BUCKET

from cluster.store import Entry, Store


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Store(f"s3://{BUCKET}/{tmp_path.name}/run")
    return Store(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def test_what_is_written_is_read_back_whole_and_in_part(store: Store) -> None:
    store.write_bytes("a/b.bin", b"0123456789")
    store.write_bytes("a/b.bin", b"abcdefghij")
    assert store.read_bytes("a/b.bin") == b"abcdefghij"
    assert store.read_range("a/b.bin", 3, 4) == b"defg"
    assert store.size_bytes("a/b.bin") == 10
    with store.open("a/b.bin") as file:
        file.seek(8)
        assert file.read() == b"ij"


def test_a_buffer_is_filled_from_an_offset_or_it_is_said_that_the_object_ends(store: Store) -> None:
    store.write_bytes("a/b.bin", b"0123456789")
    buffer = bytearray(6)
    store.read_into("a/b.bin", memoryview(buffer), 4)
    assert bytes(buffer) == b"456789"
    with pytest.raises(EOFError, match="ends before byte 11"):
        store.read_into("a/b.bin", memoryview(buffer), 5)
    with pytest.raises(FileNotFoundError):
        store.read_into("a/absent.bin", memoryview(buffer))
    store.read_into("a/b.bin", memoryview(bytearray()))
    store.prefetch(["a/b.bin", "a/absent.bin"])
    assert store.overlapped(store.read_bytes, ["a/b.bin"] * 9) == [b"0123456789"] * 9


def test_one_of_many_writers_creates(store: Store) -> None:
    writers = range(1) if store.url.startswith("memory") else range(8)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.create("marker.json", b"%d" % n), writers))
    assert sum(won) == 1
    assert store.read_bytes("marker.json") == b"%d" % won.index(True)
    assert store.create("marker.json", b"late") is False


def test_find_lists_files_relative_and_sorted_and_an_absent_folder_is_empty(store: Store) -> None:
    for path in ("x/2", "x/10", "x/y/1", "z"):
        store.write_bytes(path, b"..")
    assert store.find("x") == [Entry(path=path, size_bytes=2) for path in ("x/10", "x/2", "x/y/1")]
    assert store.find("absent") == []


def test_put_file_moves_a_finished_file_in(store: Store, tmp_path: Path) -> None:
    made = tmp_path / "made.tar"
    made.write_bytes(b"tar")
    store.put_file(made, "shards/00000.tar")
    assert store.read_bytes("shards/00000.tar") == b"tar"
    assert not made.exists()


def test_remove_takes_folders_and_absent_names(store: Store) -> None:
    store.write_bytes("d/e/f", b"1")
    store.remove("d")
    store.remove("d")
    assert store.find() == []


def test_a_pickled_store_opens_the_same_place(store: Store) -> None:
    store.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"


def test_local_writes_leave_no_temporary_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("a", b"1")
    store.create("a", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
