"""The momentum encoder is the exact average under every ZeRO stage, and a resumed run has it to the last bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.config import parse
from training.config import TrainConfig
from training.data.tokenizer import Tokenizer
from training.engine import Engine
from training.methods import Batch, build_method
from training.momentum import follow, momentum_at

NUM_STEPS = 6
MOMENTUM = 0.7
"""Far from 1, so that a wrong average shows."""


def test_momentum_goes_from_its_start_to_one_on_half_a_cosine() -> None:
    found = [momentum_at(step, 10, start=0.995) for step in (0, 5, 10, 11)]
    assert found == pytest.approx([0.995, 0.9975, 1.0, 1.0])
    assert momentum_at(1, 10, start=0.9) < 0.9 + 0.01 * 0.25  # flat at first


def test_follow_moves_targets_by_the_hand_computed_amount() -> None:
    target, source = (torch.nn.Parameter(torch.tensor(x)) for x in ([1.0, 4.0], [3.0, 0.0]))
    follow([(target, source)], 0.75)
    assert target.tolist() == [1.5, 3.0]
    follow([(target, source)], 0.0)
    assert torch.equal(target, source)
    follow([], 0.5)


@pytest.fixture
def make_engine(write_config: Callable[..., Path], one_rank: None, tmp_path: Path) -> Callable[..., Engine]:
    def make(**keys: Any) -> Engine:
        m3i = {"form": "siamese_feature", "momentum": MOMENTUM, "predictor": {"width": 16, "depth": 1, "heads": 2}}
        file = write_config(tmp_path / "tiny.yaml", method="m3i", m3i=m3i)
        config = parse(TrainConfig, [str(file), "output=unused", *(f"{name}={value}" for name, value in keys.items())])
        torch.manual_seed(0)
        method = build_method("m3i", config.m3i, config.model, Tokenizer(context_length=16))
        return Engine(method, config, num_ranks=1, device=torch.device("cpu"))

    return make


def batch(step: int) -> Batch:
    images = torch.randint(0, 256, (16, 32, 32, 3), generator=torch.Generator().manual_seed(step)).to(torch.uint8)
    ids = torch.arange(16) + 16 * step
    epoch = torch.zeros(16, dtype=torch.int64)
    return Batch(images=images, captions=[""] * 16, sample_ids=ids, epoch=epoch, step=step, seed=0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_target_is_the_average_of_the_encoders_weights_under_every_zero_stage(
    make_engine: Callable[..., Engine], zero_stage: int
) -> None:
    engine = make_engine(**{"train.zero_stage": zero_stage, "train.precision": "bf16"})
    seen: list[dict[str, Tensor]] = []
    for step in range(NUM_STEPS):
        seen.append(engine.full_weights())
        engine.gradients(batch(step), NUM_STEPS)
        engine.update(learning_rate=0.02)
    found = engine.full_weights()
    names = [name for name in found if name.startswith("target.")]
    assert names
    for name in names:
        online = name.replace("target.", "towers.image.")
        expected = seen[0][online]
        for step in range(1, NUM_STEPS):
            m = 1 - (1 - MOMENTUM) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / NUM_STEPS))).item()
            expected = m * expected + (1 - m) * seen[step][online]
        # Float32 throughout: a few roundings. In bfloat16 the error would be 1e-3.
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        assert found[name].dtype == torch.float32
    assert any((found[name] - found[name.replace("target.", "towers.image.")]).abs().max() > 1e-2 for name in names)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_resumed_run_repeats_weights_target_and_balance_to_the_last_bit(
    train_tiny: Callable[..., Any], tmp_path: Path, zero_stage: int
) -> None:
    words = [
        "method=m3i", f"train.zero_stage={zero_stage}", "train.num_steps=6", "checkpoint.every_steps=3",
        "checkpoint.keep=9", "m3i.balance=true", "m3i.predictor.width=32", "m3i.predictor.heads=2",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_tiny(whole, *words)
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoints").glob("step-00000006*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (cut / "result.json").unlink()
    train_tiny(cut, *words)
    first, second = (
        torch.load(run / "checkpoints/step-00000006/weights.pt", weights_only=True) for run in (whole, cut)
    )
    assert first.keys() == second.keys()
    assert {"target.norm.weight", "balance.norms"} <= first.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert (first["balance.norms"] > 0).all()


def test_two_ranks_that_hold_half_of_each_weight_average_it_exactly(
    write_config: Callable[..., Path], run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    m3i = {"form": "siamese_feature", "momentum": MOMENTUM, "predictor": {"width": 16, "depth": 1, "heads": 2}}
    file = write_config(tmp_path / "tiny.yaml", method="m3i", m3i=m3i)
    words = ["train.zero_stage=3", "train.num_steps=3", "optim.warmup_steps=0", "checkpoint.every_steps=1"]
    run_ranks(["-m", "training", "train", str(file), f"output={tmp_path / 'run'}", "checkpoint.keep=9", *words])
    after = [
        torch.load(tmp_path / f"run/checkpoints/step-{step:08}/weights.pt", weights_only=True) for step in (1, 2, 3)
    ]
    targets = [name for name in after[0] if name.startswith("target.")]
    for step in (1, 2):
        m = momentum_at(step, 3, start=MOMENTUM)
        before, now = after[step - 1], after[step]
        for name in targets:
            online = before[name.replace("target.", "towers.image.")]
            torch.testing.assert_close(now[name], m * before[name] + (1 - m) * online, rtol=1e-6, atol=1e-7)
    moved = [name for name in targets if not torch.equal(after[2][name], after[0][name])]
    assert len(moved) > len(targets) / 2
