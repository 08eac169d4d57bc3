"""Checkpoints: only whole ones are believed, the newest are kept, and they live on any store."""

import contextlib
import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import parse
from cluster.errors import RunError
from cluster.store import Store
from training import checkpoint, launch, trainer
from training.checkpoint import CheckpointInfo, Checkpoints, newest_valid, published
from training.command import RESULT_FILE, TrainResult, run_train
from training.config import TrainConfig
from training.engine import Engine
from training.launch import single_group
from training.metrics import read_lines

Trainer = Callable[..., TrainResult]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run with checkpoints of steps 3, 6 and 9, as if it had been killed at its end."""
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    (copy / RESULT_FILE).unlink()
    return copy


def newest_step(run: Path) -> int | None:
    info = newest_valid(Store(str(run)))
    return info.step if info else None


def test_marker_names_every_file(run: Path) -> None:
    assert [info.step for info in published(Store(str(run)))] == [9, 6, 3]
    for info in published(Store(str(run))):
        listed = {file.path for file in info.files}
        assert listed == {str(path.relative_to(run)) for path in (run / info.folder).rglob("*") if path.is_file()}
        assert info.samples_seen == 16 * info.step
    names = {path.name for path in (run / "checkpoints/step-00000009").iterdir()}
    assert {"weights.pt", "config.json", "tokenizer.json", "random-00000.pt"} <= names


@pytest.mark.parametrize("name", ["weights.pt", "mp_rank_00_model_states.pt", "random-00000.pt"])
def test_truncated_checkpoint_is_never_loaded(run: Path, name: str) -> None:
    path = run / "checkpoints/step-00000009" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert newest_step(run) == 6


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672] . x")],
    ids=["os", "torch"],
)
def test_full_disk_ends_the_training_with_its_name(
    train_tiny: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save = Engine.save

    def fill_up(engine: Engine, *args: Any) -> None:
        save(engine, *args)
        if engine.steps > 3:
            raise error

    monkeypatch.setattr(Engine, "save", fill_up)
    with pytest.raises(RunError, match=r"no space left on the disk of .* make room there"):
        train_tiny(tmp_path / "run")
    assert newest_step(tmp_path / "run") == 3
    assert list((tmp_path / "run/work").iterdir()) == []


def test_changed_bit_or_missing_file_or_marker_is_noticed(run: Path) -> None:
    weights = run / "checkpoints/step-00000009/weights.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert newest_step(run) == 6
    (run / "checkpoints/step-00000006/config.json").unlink()
    assert newest_step(run) == 3
    (run / "checkpoints/step-00000003.json").write_text('{"step": 3')
    assert newest_step(run) is None


def test_run_with_a_truncated_newest_checkpoint_resumes_from_the_one_before(
    train_tiny: Trainer, finished_run: Path, run: Path
) -> None:
    states = next((run / "checkpoints/step-00000009").glob("*optim_states.pt"))
    states.write_bytes(states.read_bytes()[:1000])
    train_tiny(run, "checkpoint.keep=9")
    expected = [line["loss"] for line in read_lines(Store(str(finished_run)))]
    assert [line["loss"] for line in read_lines(Store(str(run)))] == expected
    assert newest_step(run) == 9


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_newest_checkpoint_does_not_crowd_out_the_next_ones(
    train_tiny: Trainer, run: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    (run / "checkpoints/step-00000009/weights.pt").write_bytes(b"")
    cut_short = run / "checkpoints/step-00000008"
    cut_short.mkdir()
    (cut_short / "weights.pt").write_bytes(b"half")
    train = trainer.train
    with monkeypatch.context() as patch:
        patch.setattr(launch, "train", lambda *args, **more: train(*args, **more | {"stop": lambda: True}))
        assert train_tiny(run, f"checkpoint.keep={keep}").outcome == "stopped"
    assert [info.step for info in published(Store(str(run)))] == [7, 6][:keep]
    assert len(list((run / "checkpoints").iterdir())) == 2 * keep
    assert newest_step(run) == 7


def test_person_is_told_which_checkpoints_were_passed_over(
    train_tiny: Trainer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 6, 9):
        (run / f"checkpoints/step-{step:08}/weights.pt").unlink()
    train_tiny(run, "checkpoint.keep=9")
    err = capsys.readouterr().err
    for step in (3, 6, 9):
        assert f"the checkpoint of step {step} is passed over: checkpoints/step-{step:08}/weights.pt is missing" in err
    assert "training starts again from step 0" in err


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_zero_stage_resumes_exactly(
    train_tiny: Trainer, write_config: Callable[..., Path], tmp_path: Path, stage: int
) -> None:
    run, words = tmp_path / "run", [f"train.zero_stage={stage}", "checkpoint.keep=9"]
    if stage < 3:
        train_and_resume(train_tiny, run, words)
    else:  # in a process of its own: ZeRO-3 exchanges torch's linear layers for its own, for good
        config = str(write_config(tmp_path / "tiny.yaml"))
        command = [sys.executable, "-P", __file__, str(run), config, *words]
        subprocess.run(command, check=True, timeout=300)


def train_and_resume(train: Trainer, run: Path, words: list[str]) -> None:
    """Train to the end, take the last two checkpoints away, train again: the same losses and weights."""
    train(run, *words)
    expected = [line["loss"] for line in read_lines(Store(str(run)))]
    weights = torch.load(run / "checkpoints/step-00000009/weights.pt", weights_only=True)
    (run / RESULT_FILE).unlink()
    for step in (6, 9):
        (run / f"checkpoints/step-{step:08}.json").unlink()
    train(run, *words)
    assert [line["loss"] for line in read_lines(Store(str(run)))] == expected
    again = torch.load(run / "checkpoints/step-00000009/weights.pt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_only_the_newest_are_kept(train_tiny: Trainer, tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", "checkpoint.keep=2")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000006.json",
        "step-00000009",
        "step-00000009.json",
    ]
    assert not list((tmp_path / "run/work").iterdir())


def test_run_on_an_object_store_resumes_and_gives_the_same(
    train_tiny: Trainer, finished_run: Path, tmp_path: Path
) -> None:
    url = "memory://checkpoint-test/run"
    train_tiny(url)
    store = Store(url)
    lines = [line["loss"] for line in read_lines(store)]
    assert lines == [line["loss"] for line in read_lines(Store(str(finished_run)))]
    store.remove(RESULT_FILE)
    store.remove("checkpoints/step-00000009.json")
    train_tiny(url)
    assert [line["loss"] for line in read_lines(store)] == lines
    assert any(entry.path.startswith("tensorboard/") for entry in store.find())


def test_a_failed_run_does_not_wait_for_parts_that_nobody_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "GRACE_S", 0.1)
    info = CheckpointInfo(step=3, num_ranks=2, zero_stage=2, samples_seen=48, files=())
    first = Checkpoints(Store(str(tmp_path)), rank=0, num_ranks=2, keep=1)
    publishing = first._thread.submit(first._publish, info, tmp_path / "files", contextlib.ExitStack())
    first._publishing = publishing
    with pytest.raises(ZeroDivisionError), first:
        raise ZeroDivisionError
    with pytest.raises(RunError, match=r"files-00001.json: a rank has not brought its part"):
        publishing.result(timeout=10)
    assert "the newest checkpoint was not published" in caplog.text


def test_a_group_that_starts_again_clears_what_the_killed_one_had_not_published(run: Path) -> None:
    (run / "work/checkpoint-0-abc").mkdir(parents=True)
    (run / "work/checkpoint-0-abc/weights.pt").write_bytes(b"half")
    with single_group(), pytest.raises(AttributeError):  # there is no engine to load it
        Checkpoints(Store(str(run)), rank=0, num_ranks=1, keep=1).load_newest(None)  # type: ignore[arg-type]
    assert not (run / "work").exists()
    assert newest_step(run) == 9


def test_weights_are_whole_and_fp32(run: Path) -> None:
    weights = torch.load(run / "checkpoints/step-00000009/weights.pt", weights_only=True)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert weights["towers.log_scale"].shape == ()


if __name__ == "__main__":
    with single_group():
        train_and_resume(
            lambda run, *words: run_train(parse(TrainConfig, [*words, f"output={run}"])),
            Path(sys.argv[1]),
            sys.argv[2:],
        )
