"""A full disk is named, with what to do, and what was finished stays."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cluster import disk
from cluster.cli import run_reporting_errors
from cluster.disk import full_disk, is_full
from cluster.errors import RunError
from cluster.executor import Unit, unit_task
from cluster.journal import Journal, UnitOutput
from cluster.store import Store

FULL = Path("/dev/full")  # every write says ENOSPC

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


def fill_up() -> None:
    with FULL.open("wb", buffering=0) as file:
        file.write(b"x")


class Filling:
    """A stage whose unit finds the disk full."""

    name = "filling"
    num_cpus = 1.0
    memory_bytes = 0

    def run(self, unit: Unit, output: UnitOutput) -> None:
        output.path("rows").write_bytes(b"1")
        fill_up()


def test_a_unit_on_a_full_disk_names_it(tmp_path: Path) -> None:
    task: Any = unit_task(Filling(), Journal(Store(str(tmp_path))))  # type: ignore[arg-type]
    error = task(Unit(id="00000"))
    assert isinstance(error, RunError)
    assert "no space left on the disk of" in str(error)
    assert "make room there" in str(error)
    assert "run the same command again" in str(error)
    assert [entry.path for entry in Store(str(tmp_path)).find()] == []


def test_a_store_that_cannot_be_written_to_names_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        fill_up()

    monkeypatch.setattr("cluster.store._write_synced", no_space)
    store = Store(str(tmp_path))
    with pytest.raises(RunError, match="no space left on the disk of"):
        store.write_bytes("journal/fetch.json", b"{}")
    assert os.listdir(tmp_path / "journal") == []


def test_what_a_command_meets_elsewhere_is_said_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        fill_up()
        return 0

    assert run_reporting_errors("pairmill build", command) == 1
    assert capfd.readouterr().err.startswith("pairmill build: no space left on the disk of")


def test_the_fullest_of_several_disks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {str(tmp_path): 10, "/": 5}

    class Usage:
        def __init__(self, place: Path) -> None:
            self.free, self.total = free[str(place)], 2**20

    monkeypatch.setattr(disk.shutil, "disk_usage", Usage)
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: "/")
    assert "the disk of / (1.0 MiB in all): make room there, or set TMPDIR" in str(
        full_disk(tmp_path / "not" / "there")
    )
    free["/"] = 20
    assert "TMPDIR" not in str(full_disk(tmp_path / "not" / "there"))


def test_only_a_full_disk_is_one() -> None:
    assert is_full(OSError(errno.ENOSPC, "x"))
    assert is_full(OSError(errno.EDQUOT, "x"))
    assert not is_full(OSError(errno.EIO, "x"))
    assert not is_full(ValueError("x"))
