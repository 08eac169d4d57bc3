"""Two gloo ranks under every ZeRO stage compute what one plain process computes on the whole batch."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.config import validate
from cluster.errors import RunError
from training.config import TrainConfig
from training.data.tokenizer import Tokenizer
from training.engine import Engine, adamw, decays, deepspeed_config
from training.losses.distributed import LossSum
from training.methods import Batch, build_method

NUM_STEPS = 3
CAPTIONS = ["a red disc", "a blue ring", "green", "two bars", "a square", "yellow disc", "noise", "nothing at all"]
SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "vision": {"width": 32, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8},
    "text": {"width": 32, "depth": 1, "heads": 2, "context_length": 8, "vocabulary": "compact"},
}


def make_config(zero_stage: int = 0, method: str = "clip", **optim: Any) -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "data": {"dataset": "unused"},
            "output": "unused",
            "method": method,
            "model": SIZES,
            "train": {"batch_size": 8, "precision": "fp32", "zero_stage": zero_stage},
            "optim": {"lr": 1e-2, "grad_clip": 0.5} | optim,
        },
    )


def make_method(config: TrainConfig) -> Any:
    torch.manual_seed(0)
    tokenizer = Tokenizer.build(CAPTIONS, context_length=8, vocabulary="compact")
    return build_method(config.method, config.method_config, config.model, tokenizer)


def make_batch(step: int, part: slice) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        images=torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)[part],
        captions=CAPTIONS[part],
        sample_ids=torch.arange(8)[part],
        epoch=torch.zeros(8, dtype=torch.int64)[part],
        step=step,
        seed=0,
    )


def plain_training(config: TrainConfig) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """One process, no DeepSpeed: the same optimizer on the whole batch."""
    method = make_method(config)
    optimizer = adamw(method, config.optim, fused=False)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        output = method(make_batch(step, slice(0, 8)))
        optimizer.zero_grad()
        output.loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(method.parameters(), config.optim.grad_clip)))
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return losses, norms, {name: value.clone() for name, value in method.state_dict().items()}


def rank_training(stages: list[int], output: str) -> None:
    """What each of two ranks does: train under every stage, then leave what it saw."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    found: dict[int, Any] = {}
    for stage in stages:
        config = make_config(stage)
        engine = Engine(make_method(config), config, num_ranks=2, device=torch.device("cpu"))
        losses, norms = [], []
        for step in range(NUM_STEPS):
            output_of_step = engine.gradients(make_batch(step, slice(4 * rank, 4 * rank + 4)), NUM_STEPS)
            norms.append(engine.update(config.optim.lr))
            loss = output_of_step.loss.detach().clone()
            dist.all_reduce(loss)
            losses.append(float(loss) / 2)
        found[stage] = (losses, norms, engine.full_weights())
    if rank == 0:
        torch.save(found, output)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> dict[int, Any]:
    output = tmp_path_factory.mktemp("ranks") / "found.pt"
    run_ranks([__file__, str(output)])  # this file, as a script: see its end
    found: dict[int, Any] = torch.load(output, weights_only=True)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_plain_process(two_ranks: dict[int, Any], stage: int) -> None:
    expected_losses, expected_norms, expected = plain_training(make_config(stage))
    losses, norms, weights = two_ranks[stage]
    # fp32 sums in another order; three Adam steps of 1e-2 enlarge a difference of 1e-7 by about 1e2.
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].shape == value.shape
        torch.testing.assert_close(weights[name], value, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_that_is_not_finite_changes_nothing(one_rank: None, accumulation: int) -> None:
    config = make_config(2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"accumulation": accumulation})})
    method = make_method(config)
    contrast = method.contrast

    def poisoned(own: Any, everyone: Any) -> LossSum:
        # The square root of zero: a finite loss with an infinite gradient.
        return LossSum(contrast(own, everyone).sum + (method.towers.log_scale * 0).abs().sum().sqrt(), torch.tensor(8))

    method.contrast = poisoned
    engine = Engine(method, config, num_ranks=1, device=torch.device("cpu"))
    before = engine.full_weights()
    assert engine.gradients(make_batch(0, slice(0, 8)), 1).loss.isfinite()
    with pytest.raises(RunError, match="gradient is not finite"):
        engine.update(1e-2)
    after = engine.full_weights()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_bf16_computes_in_bf16_and_keeps_weights_and_temperature_in_fp32(one_rank: None) -> None:
    config = make_config(2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    engine = Engine(make_method(config), config, num_ranks=1, device=torch.device("cpu"))
    seen: set[torch.dtype] = set()
    for module in engine.deepspeed.module.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    output = engine.gradients(make_batch(0, slice(0, 8)), 1)
    engine.update(1e-2)
    assert torch.bfloat16 in seen
    assert output.loss.dtype == torch.float32
    assert {value.dtype for value in engine.full_weights().values()} == {torch.float32}
    assert engine.deepspeed.module.towers.log_scale.dtype == torch.float32


def test_vectors_and_positions_do_not_decay() -> None:
    method = make_method(make_config())
    kept = {name for name, parameter in method.named_parameters() if not decays(name, parameter)}
    assert "towers.log_scale" in kept
    assert all(parameter.ndim >= 2 for name, parameter in method.named_parameters() if name not in kept)
    assert any("position" in name for name in kept)
    decayed, undecayed = adamw(method, make_config(weight_decay=0.3).optim, fused=False).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(method.parameters()))


def test_deepspeed_is_told_everything_that_matters() -> None:
    settings = deepspeed_config(make_config(2, grad_clip=0.0), num_ranks=4)
    assert settings["gradient_clipping"] == 0.0
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["torch_autocast"]["enabled"] is False


def test_saved_state_is_taken_over_by_a_fresh_engine(one_rank: None, tmp_path: Path) -> None:
    config = make_config(2)
    first = Engine(make_method(config), config, num_ranks=1, device=torch.device("cpu"))
    first.gradients(make_batch(0, slice(0, 8)), 2)
    first.update(1e-2)
    first.save(str(tmp_path), "saved", {"note": 7})
    second = Engine(make_method(config), config, num_ranks=1, device=torch.device("cpu"))
    assert second.load(str(tmp_path), "saved")["note"] == 7
    assert second.steps == 1
    for engine in (first, second):
        engine.gradients(make_batch(1, slice(0, 8)), 2)
        engine.update(1e-2)
    weights = second.full_weights()
    assert all(torch.equal(weights[name], value) for name, value in first.full_weights().items())


if __name__ == "__main__":
    rank_training([0, 1, 2, 3], sys.argv[1])
