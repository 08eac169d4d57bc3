"""The loop: it learns, records what it did, resumes exactly, and stops before it spoils anything."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import RequestError, RunError
from cluster.store import Store
from training import launch, trainer
from training.checkpoint import newest_valid
from training.command import RESULT_FILE, TrainResult
from training.data.dataset import Dataset
from training.metrics import read_lines

Trainer = Callable[..., TrainResult]


def losses_of(folder: Path) -> list[float]:
    lines = read_lines(Store(str(folder)))
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def unfinish(finished: Path, copy: Path, steps_kept: list[int]) -> Path:
    """A copy of a finished run as if it had been killed: only these checkpoints, no result."""
    shutil.copytree(finished, copy)
    (copy / RESULT_FILE).unlink()
    for marker in copy.glob("checkpoints/*.json"):
        if int(marker.stem[5:]) not in steps_kept:
            marker.unlink()
            shutil.rmtree(marker.with_suffix(""))
    return copy


def test_loss_falls_and_every_step_is_recorded(finished_run: Path) -> None:
    losses = losses_of(finished_run)
    assert len(losses) == 9
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    last = read_lines(Store(str(finished_run)))[-1]
    assert last["epoch"] == pytest.approx(9 * 16 / 64)
    assert {
        "loss/contrastive",
        "metric/logit_scale",
        "lr",
        "grad_norm",
        "samples_per_s",
        "data_wait_share",
    } < last.keys()
    assert list(finished_run.glob("tensorboard/events*"))
    assert json.loads((finished_run / RESULT_FILE).read_text())["checkpoint"] == "checkpoints/step-00000009"


def test_learning_rate_follows_applied_steps(finished_run: Path) -> None:
    rates = [line["lr"] for line in read_lines(Store(str(finished_run)))]
    assert rates[:2] == pytest.approx([1e-3, 2e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 2e-4


@pytest.mark.parametrize("kept", [[6], [3], []])
def test_resumed_run_repeats_the_losses_to_the_last_bit(
    train_tiny: Trainer, finished_run: Path, tmp_path: Path, kept: list[int]
) -> None:
    resumed = unfinish(finished_run, tmp_path / "resumed", kept)
    train_tiny(resumed, "checkpoint.keep=9")
    assert losses_of(resumed) == losses_of(finished_run)
    expected, weights = (
        torch.load(folder / "checkpoints/step-00000009/weights.pt", weights_only=True)
        for folder in (finished_run, resumed)
    )
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_stopped_run_checkpoints_and_goes_on(
    train_tiny: Trainer, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([False] * 4 + [True] * 9)
    train = trainer.train
    with monkeypatch.context() as patch:
        patch.setattr(launch, "train", lambda *args, **more: train(*args, **more | {"stop": lambda: next(asked)}))
        assert train_tiny(tmp_path / "run").outcome == "stopped"
    assert len(losses_of(tmp_path / "run")) == 5
    assert newest_valid(Store(str(tmp_path / "run"))).step == 5  # type: ignore[union-attr]
    assert train_tiny(tmp_path / "run").outcome == "done"
    assert losses_of(tmp_path / "run") == losses_of(finished_run)


def test_accumulating_run_follows_the_undivided_one_and_resumes_to_the_last_bit(
    train_tiny: Trainer, finished_run: Path, tmp_path: Path
) -> None:
    words = ("train.accumulation=4", "train.activation_checkpointing=true", "checkpoint.keep=9")
    train_tiny(tmp_path / "parts", *words)
    # bf16 in smaller groups: three significant digits, over nine steps.
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(finished_run), rel=2e-2)
    run = unfinish(tmp_path / "parts", tmp_path / "resumed", [6])
    assert train_tiny(run, *words).outcome == "done"
    assert losses_of(run) == losses_of(tmp_path / "parts")


def test_leftovers_of_a_killed_run_are_cleared(train_tiny: Trainer, finished_run: Path, tmp_path: Path) -> None:
    run = unfinish(finished_run, tmp_path / "run", [3])
    (run / "stop").write_bytes(b"")
    (run / "failure.json").write_text("{}")
    (run / "work/checkpoint-0-killed").mkdir(parents=True)
    assert train_tiny(run, "checkpoint.keep=9").outcome == "done"
    assert losses_of(run) == losses_of(finished_run)
    assert not [name for name in ("stop", "failure.json", "work/checkpoint-0-killed") if (run / name).exists()]


def test_same_command_on_a_finished_run_does_nothing(train_tiny: Trainer, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert train_tiny(finished_run, "checkpoint.keep=9").already_done
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_other_settings_on_the_same_output_are_refused(train_tiny: Trainer, finished_run: Path) -> None:
    with pytest.raises(RequestError, match=r"optim\.lr: the run has 0\.002, this request has 0\.1"):
        train_tiny(finished_run, "optim.lr=0.1")


def test_dataset_that_changed_since_the_run_began_is_refused(
    train_tiny: Trainer, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    words = [f"data.dataset={make_dataset('data')}", "train.num_steps=2", "optim.warmup_steps=0"]
    train_tiny(tmp_path / "run", *words)
    other = make_dataset("other", num_samples=97)
    shutil.rmtree(tmp_path / "data")
    other.rename(tmp_path / "data")
    for result in (True, False):  # finished or not
        with pytest.raises(RequestError, match="changed since this run began"):
            train_tiny(tmp_path / "run", *words)
        if result:
            (tmp_path / "run" / RESULT_FILE).unlink()


def test_person_is_told_which_images_were_replaced(
    train_tiny: Trainer, make_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_dataset()
    sample = Dataset(str(data)).sample(5)
    with open(data / "shards/00000.tar", "r+b") as tar:
        tar.seek(sample.image_offset)
        tar.write(bytes(sample.image_size))
    train_tiny(tmp_path / "run", f"data.dataset={data}")
    assert "images that cannot be decoded, replaced by the next ones: 1 (shards/00000.tar 000000005; " in (
        capsys.readouterr().err
    )
    assert list(json.loads((tmp_path / "run/metrics/bad-images.json").read_text())) == ["shards/00000.tar 000000005"]


def test_loss_that_is_not_finite_stops_before_the_update(
    train_tiny: Trainer, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unfinish(finished_run, tmp_path / "run", [3])
    gradients = trainer.Engine.gradients
    updates: list[int] = []
    update = trainer.Engine.update

    def poisoned(self: Any, batch: Any, num_steps: int) -> Any:
        if batch.step == 5:
            with torch.no_grad():
                next(iter(self.deepspeed.module.towers.image.parameters())).fill_(float("nan"))
        return gradients(self, batch, num_steps)

    def counted(self: Any, learning_rate: float) -> float:
        updates.append(self.steps)
        return update(self, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Engine, "gradients", poisoned)
        patch.setattr(trainer.Engine, "update", counted)
        with pytest.raises(RunError, match=r"step 5: the loss is not finite \(contrastive nan\)") as caught:
            train_tiny(run)
    assert updates == [3, 4]
    message = str(caught.value)
    assert "the checkpoint of step 3 is valid" in message
    record = json.loads((run / "metrics/not-finite-step-00000005.json").read_text())
    assert len(record["uids"]) == 16
    assert re.findall(r"\b[0-9a-f]{32}\b", message) == record["uids"][:4]
    train_tiny(run, "checkpoint.keep=9")
    assert losses_of(run) == losses_of(finished_run)


def test_learning_rate_out_of_range_ends_the_run_with_a_message(train_tiny: Trainer, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not finite .*lower optim\.lr"):
        train_tiny(tmp_path / "run", "optim.lr=1e30", "optim.warmup_steps=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.batch_size=2000"], "train.batch_size=2000: only 64 of 96 samples"),
        (["data.select=style=nobody"], "only 0 of 96 samples"),
        (["data.select=styl=plain"], "did you mean style"),
        (["data.caption_column=captoin"], "did you mean caption"),
        (["data.dataset=/nowhere"], "no finished dataset here"),
        (["optim.warmup_steps=10"], "optim.warmup_steps=10: the run has 9 steps"),
        (["train.num_ranks=2"], "ray.address=inline runs one rank"),
        (["method=rlis"], "did you mean rils"),
        (["optim.min_lr=1"], "above optim.lr"),
        (["train.accumulation=5"], "train.accumulation=5: a rank's 16 samples of a step cannot be cut"),
        (["train.batch_size=15", "train.num_ranks=2"], "no multiple of train.num_ranks=2"),
    ],
)
def test_bad_request_is_refused_before_work(
    train_tiny: Trainer, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        train_tiny(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
