"""Local folders for files on their way to a store go with their owner, however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.scratch import scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_folder_goes_when_it_is_left(temporary: Path) -> None:
    with scratch_folder() as folder:
        (folder / "images.tar").write_bytes(b"1")
        assert folder.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_killed_owners_folder_goes_and_a_living_ones_stays(temporary: Path) -> None:
    code = (
        "import sys\nfrom cluster.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n print(folder, flush=True); sys.stdin.read()"
    )
    owners = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, living = (Path((owner.stdout or sys.stdin).readline().strip()) for owner in owners)
    owners[0].kill()
    owners[0].wait()
    assert killed.exists()
    with scratch_folder():
        assert not killed.exists()
        assert living.exists()
    owners[1].communicate("")
    assert not living.exists()


def test_folders_of_others_are_left_alone(temporary: Path) -> None:
    (temporary / "pairmill-of-a-person").mkdir()
    with scratch_folder():
        pass
    assert (temporary / "pairmill-of-a-person").exists()
