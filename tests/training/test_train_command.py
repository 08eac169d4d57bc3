"""The command itself, in processes of its own: Ray Train, torchrun, killed ranks, signals, exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.store import Store
from training.__main__ import main
from training.checkpoint import newest_valid
from training.metrics import read_lines

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
NUM_STEPS, KILL_AFTER = 300, 34
WORDS = [f"train.num_steps={NUM_STEPS}", "checkpoint.every_steps=25", "optim.lr=5e-4", "train.num_ranks=2"]


@pytest.fixture(scope="module")
def config(write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("config") / "tiny.yaml"))


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `... training train ...`; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(prefix: list[str], *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, "training", "train", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def undisturbed(config: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run of two ranks that torchrun started and nobody disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(
        [*TORCHRUN, "training", "train", config, f"output={run}", *WORDS],
        check=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return losses_of(run)


def losses_of(run: Path, rank: int = 0) -> list[float]:
    lines = read_lines(Store(str(run)), rank)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def wait_for_steps(run: Path, process: subprocess.Popen[str], num_steps: int, timeout_s: float = 120) -> None:
    """Wait until so many steps are recorded and rank 0 has said who it is."""
    deadline = time.monotonic() + timeout_s
    while len(read_lines(Store(str(run)))) < num_steps or not (run / "progress.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_rank_in_mid_training(run: Path, process: subprocess.Popen[str]) -> None:
    """kill -9 of the process of rank 0, once it is past a checkpoint."""
    wait_for_steps(run, process, KILL_AFTER)
    os.kill(json.loads((run / "progress.json").read_text())["pid"], signal.SIGKILL)
    assert len(read_lines(Store(str(run)))) < NUM_STEPS, "the run was over before it could be killed"


@pytest.mark.slow
def test_stopped_and_killed_run_on_ray_ends_with_the_same_losses(
    start: Callable[..., subprocess.Popen[str]], config: str, tmp_path: Path, undisturbed: list[float]
) -> None:
    run = tmp_path / "run"
    words = [config, f"output={run}", *WORDS, "ray.address=", "ray.num_cpus=2"]
    stopped = start([sys.executable, "-P", "-m"], *words)
    wait_for_steps(run, stopped, 5)
    stopped.terminate()
    _, err = stopped.communicate(timeout=30)
    assert stopped.returncode == 130, err
    assert "run the same command to go on" in err
    assert newest_valid(Store(str(run))) is not None
    (run / "progress.json").unlink()  # it names the rank of the first start
    process = start([sys.executable, "-P", "-m"], *words)
    kill_rank_in_mid_training(run, process)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert losses_of(run) == undisturbed
    assert len(losses_of(run, rank=1)) == NUM_STEPS
    assert [line.partition(":")[0] for line in out.splitlines()] == ["train clip", "run", "next"]
    assert f"run: {run}" in out
    assert "resumed at step" in err
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in err


@pytest.mark.slow
def test_killed_rank_of_torchrun_fails_and_the_same_command_goes_on(
    start: Callable[..., subprocess.Popen[str]], config: str, tmp_path: Path, undisturbed: list[float]
) -> None:
    run = tmp_path / "run"
    words = [config, f"output={run}", *WORDS]
    process = start(TORCHRUN, *words)
    kill_rank_in_mid_training(run, process)
    process.communicate(timeout=60)
    assert process.returncode == 1
    again = start(TORCHRUN, *words)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert losses_of(run) == undisturbed
    assert f"run: {run}" in out


def test_rank_that_fails_under_torchrun_ends_all_with_one_reason(
    start: Callable[..., subprocess.Popen[str]], config: str, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_dataset("lacking")
    (data / "shards/00001.tar").unlink()
    process = start(TORCHRUN, config, f"data.dataset={data}", f"output={tmp_path / 'run'}", *WORDS)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "shards/00001.tar: this shard is missing" in err
    assert "training/__main__.py" not in err, "a traceback of ours"


def test_refusal_under_torchrun_is_said_once(
    start: Callable[..., subprocess.Popen[str]], config: str, tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("not a run")
    process = start(TORCHRUN, config, f"output={tmp_path}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("holds files that belong to no pairmill run (letter.txt") == 1


def test_sigterm_checkpoints_exits_130_and_says_how_to_go_on(
    start: Callable[..., subprocess.Popen[str]], config: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start([sys.executable, "-P", "-m"], config, f"output={run}", "train.num_steps=100000")
    wait_for_steps(run, process, 5)
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "run the same command to go on" in err
    newest = newest_valid(Store(str(run)))
    assert newest is not None
    assert newest.step == len(read_lines(Store(str(run))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "data.dataste=x"], "unknown key data.dataste; did you mean data.dataset?"),
        (["train", "data.dataset=x"], "output: required"),
        (["train", "output=x"], "data.dataset: required"),
        (["train", "nothing.yaml"], "no such configuration file"),
        (["train", "data.dataset=x", "output=y", "train.batch_size=many"], "train.batch_size=many"),
        (["train", "data.dataset=x", "output=y", "model.vision.patch_size=15"], "no multiple of patch_size"),
        (["eval", "checkpoint=/nowhere"], "holds no pairmill run"),
        (["trein"], "did you mean train?"),
        (["report", "/nowhere"], "holds no pairmill run"),
    ],
)
def test_bad_request_exits_2_with_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pairmill {words[0]}: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_lists_every_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    keys = {"train": ["data.dataset", "optim.lr", "rils.mask_ratio", "train.zero_stage"], "eval": ["class_column"]}
    assert all(f"  {name}=" in printed for name in keys[command])
