"""A run goes on with another number of ranks: the same samples, crops and masks, and losses but for the sums' order."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.store import Store
from training.checkpoint import published
from training.command import RESULT_FILE, TrainResult
from training.metrics import read_lines

WORDS = ["train.precision=fp32", "checkpoint.keep=9"]
STEP = 6  # of the checkpoint that the other number of ranks takes over
TOLERANCE = 1e-4
M3I = [
    "method=m3i",
    "m3i.predictor.width=32",
    "m3i.predictor.depth=1",
    "m3i.predictor.heads=2",
]  # a frozen momentum copy


@pytest.fixture
def two_ranks(run_ranks: Callable[..., None], write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., None]:
    config = str(write_config(tmp_path / "tiny.yaml"))

    def train(run: Path, *words: str) -> None:
        run_ranks(["-P", "-m", "training", "train", config, f"output={run}", *WORDS, *words])

    return train


def cut(run: Path, target: Path) -> Path:
    """A copy of a finished run as if it had been killed after step `STEP`."""
    shutil.copytree(run, target)
    (target / RESULT_FILE).unlink()
    for info in list(published(Store(str(target)))):
        if info.step > STEP:
            (target / f"{info.folder}.json").unlink()
    return target


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(Store(str(run)))]


@pytest.mark.parametrize("words", [["method=clip"], M3I], ids=["clip", "m3i"])
def test_two_ranks_hand_over_to_one(
    train_tiny: Callable[..., TrainResult], two_ranks: Callable[..., None], tmp_path: Path, words: list[str]
) -> None:
    two_ranks(tmp_path / "run", *words)
    resumed = cut(tmp_path / "run", tmp_path / "resumed")
    assert train_tiny(resumed, *WORDS, *words).outcome == "done"
    assert losses(resumed)[:STEP] == losses(tmp_path / "run")[:STEP]
    assert losses(resumed) == pytest.approx(losses(tmp_path / "run"), rel=TOLERANCE)
    assert [info.num_ranks for info in published(Store(str(resumed)))] == [1, 2, 2]
    assert not (resumed / "work/universal").exists()


@pytest.mark.parametrize("stage", [0, 3])
def test_one_rank_hands_over_to_two(
    two_ranks: Callable[..., None],
    write_config: Callable[..., Path],
    run_ranks: Callable[..., None],
    tmp_path: Path,
    stage: int,
) -> None:
    words = [f"train.zero_stage={stage}"]
    one_rank(write_config, tmp_path, words)
    resumed = cut(tmp_path / "run", tmp_path / "resumed")
    two_ranks(resumed, *words)
    assert losses(resumed) == pytest.approx(losses(tmp_path / "run"), rel=TOLERANCE)
    assert [info.num_ranks for info in published(Store(str(resumed)))] == [2, 1, 1]


def one_rank(write_config: Callable[..., Path], folder: Path, words: list[str]) -> None:
    """In a process of its own: ZeRO-3 exchanges torch's linear layers for its own, for good."""
    config = str(write_config(folder / "one.yaml"))
    command = [sys.executable, "-P", "-m", "training", "train", config, f"output={folder / 'run'}", *WORDS, *words]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
