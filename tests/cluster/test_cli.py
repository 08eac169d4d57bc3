"""What a person meets first: help, unknown commands, status and joined reports."""

import errno
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cluster.cli import OWNERS, main, overview, run_reporting_errors
from cluster.config import Config, key
from cluster.executor import InlineExecutor, Unit, run_stage
from cluster.journal import UnitOutput
from cluster.progress import Progress
from cluster.run import open_run


class Nothing(Config):
    seed: int = key(0, "seed")


class Count:
    name = "count"
    num_cpus = 1.0
    memory_bytes = 0

    def units(self) -> list[Unit]:
        return [Unit(id=str(n)) for n in range(3)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        if unit.id == "2":
            raise KeyboardInterrupt
        output.count("rows", 10)
        output.count("reason:timeout", 4)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in OWNERS)


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "pairmill trian: unknown command; did you mean train?\n"


@pytest.mark.parametrize("command", ["build", "train", "eval"])
def test_help_prints_every_key_with_its_default(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster.cli", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "output=" in done.stdout
    assert "ray.address=" in done.stdout or command == "eval"


def test_a_folder_named_pipeline_in_the_current_directory_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__main__.py").write_text("print('the wrong one')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster.cli", "build", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the wrong one" not in done.stdout
    assert "input=" in done.stdout


def test_status_tells_what_is_done_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(str(tmp_path / "out"), "build", Nothing())
    with pytest.raises(KeyboardInterrupt):
        run_stage(Count(), run.journal, InlineExecutor(), Progress())
    assert main(["status", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2/3" in printed
    assert "timeout 8" in printed
    assert "run the same build command to go on" in printed


def test_status_of_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no pairmill run" in capsys.readouterr().err


def test_status_of_a_training_run_shows_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(str(tmp_path / "out"), "train", Nothing())
    lines = [json.dumps({"step": step, "loss": 4.0 / step}) for step in (1, 2)]
    run.store.write_bytes("metrics/rank0.jsonl", ("\n".join(lines) + '\n{"step": 3, "lo').encode())
    assert main(["status", str(tmp_path / "out")]) == 0
    assert "2" in capsys.readouterr().out


def test_a_full_disk_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out/run.json")

    assert run_reporting_errors("pairmill build", fill) == 1
    said = capsys.readouterr().err
    assert said.startswith("pairmill build: no space left on the disk of /data/out/run.json (")
    assert said.endswith("make room there; what is finished is kept, run the same command again to go on\n")


def test_first_steps_of_the_help_are_commands_that_parse() -> None:
    @cache
    def help_of(command: str) -> str:
        words = [sys.executable, "-P", "-m", "cluster.cli", command, "--help"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    for line in overview().splitlines():
        if line.startswith("  pairmill "):
            _, command, *settings = line.split()
            assert all(f"  {setting.partition('=')[0]}=" in help_of(command) for setting in settings), line


def test_several_reports_need_a_place_for_the_joined_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "output=PAGE.html" in capsys.readouterr().err


def test_doctor_exit_status_tells_whether_there_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "now"]) == 2
    status = main(["doctor"])
    printed = capsys.readouterr().out
    assert status == ("PROBLEM" in printed)
    assert "deepspeed" in printed
    assert "free disk here" in printed
