"""One folder holds one run: the same request resumes it, any other is refused with the differing keys."""

from pathlib import Path

import pytest

from cluster.config import Config, key
from cluster.errors import RequestError
from cluster.run import open_run, require_run
from cluster.store import Entry, Store


class Small(Config):
    seed: int = key(0, "seed")
    workers: int = key(1, "tasks at once", affects_result=False)


def test_the_same_request_resumes(tmp_path: Path) -> None:
    assert open_run(str(tmp_path / "out"), "build", Small()).resumed is False
    assert open_run(str(tmp_path / "out"), "build", Small(workers=2)).resumed is True


def test_other_settings_are_refused_with_the_differing_keys(tmp_path: Path) -> None:
    open_run(str(tmp_path / "out"), "build", Small())
    with pytest.raises(RequestError, match="seed: the run has 0, this request has 3"):
        open_run(str(tmp_path / "out"), "build", Small(seed=3))


def test_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    open_run(str(tmp_path / "out"), "build", Small())
    with pytest.raises(RequestError, match="holds a build run, this is a train run"):
        open_run(str(tmp_path / "out"), "train", Small())


def test_a_folder_with_foreign_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(RequestError, match=r"belong to no pairmill run \(thesis.tex"):
        open_run(str(tmp_path), "build", Small())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no pairmill run"):
        require_run(str(tmp_path), "build")


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RequestError, match=r"run\.json: not readable as JSON"):
        open_run(str(tmp_path), "build", Small())


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot open this location"):
        open_run("nowhere://bucket/out", "build", Small())


@pytest.mark.parametrize("place", ["list.csv", "list.csv/out", "/proc/out"])
def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "list.csv").write_text("url,caption\n")
    with pytest.raises(RequestError, match=r"cannot be read|cannot be read or written"):
        open_run(str(tmp_path / place), "build", Small())


def test_a_run_whose_files_between_stages_are_others_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    open_run(out, "build", Small(), 1)
    assert open_run(out, "build", Small(), 1).resumed is True
    assert open_run(out, "build", Small()).resumed is True
    with pytest.raises(RequestError, match=r"was begun by another version of pairmill \(\d.*choose another output"):
        open_run(out, "build", Small(), 2)


def test_a_file_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption\n")
    with pytest.raises(RequestError, match=r"cannot be read as the folder of a run \(Not a directory\); choose"):
        require_run(str(tmp_path / "list.csv"))


def test_the_same_command_started_twice_at_once_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one registers between our look for a run and our look for strangers."""
    find = Store.find

    def find_late(store: Store, prefix: str = "") -> list[Entry]:
        monkeypatch.setattr(Store, "find", find)
        open_run(str(tmp_path / "out"), "build", Small())
        return find(store, prefix)

    monkeypatch.setattr(Store, "find", find_late)
    assert open_run(str(tmp_path / "out"), "build", Small()).resumed is True
