"""What one rank of a world computes for the equivalence matrix.

    torchrun-like environment; python equivalence.py CASES.json OUTPUT.json

For every case: the gradient that DeepSpeed holds for its optimizer, against plain autograd on the whole batch in one
process, fp32 both. Starting a world costs seconds, so each goes through all of its cases.
"""

import gc
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_batch, make_config, make_method

from training.engine import Engine, checkpoint_activations

NUM_STEPS = 10
STEP = make_batch(0, 1).step


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the matrix."""

    variant: str
    zero_stage: int
    num_ranks: int
    accumulation: int
    checkpointing: bool

    def __str__(self) -> str:
        kept = "recomputed" if self.checkpointing else "kept"
        return f"{self.variant}-zero{self.zero_stage}-{self.num_ranks}ranks-{self.accumulation}parts-{kept}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """error: largest |g - g'| of a parameter over the largest |g'| of it. where: the parameter."""

    error: float
    where: str
    loss: float
    expected_loss: float


@cache
def reference(variant: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole batch: one process, no group, no engine."""
    assert not dist.is_initialized()
    method = make_method(make_config(variant))
    method.before_step(STEP, NUM_STEPS)
    output = method(make_batch(0, 1))
    output.loss.backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    unused = [name for name, p in trained.items() if p.grad is None]
    assert not unused, f"{variant}: no part in the loss: {unused}"
    return float(output.loss.detach()), {name: p.grad.clone() for name, p in trained.items()}  # type: ignore[union-attr]


def build(case: Case) -> Engine:
    """The engine of a case."""
    config = make_config(case.variant, zero_stage=case.zero_stage)
    return Engine(make_method(config), config, num_ranks=case.num_ranks, device=torch.device("cpu"))


def compare(case: Case, engine: Engine) -> Found:
    """Run one case and leave the weights as they were; collective."""
    from deepspeed.utils import safe_get_full_grad

    engine.accumulation = case.accumulation
    checkpoint_activations(engine.deepspeed.module, case.checkpointing)
    output = engine.gradients(make_batch(dist.get_rank(), case.num_ranks), NUM_STEPS)
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    expected_loss, expected = reference(case.variant)
    # Gradients far below the rest are rounding of sums that cancel: compared with what they were summed from.
    floor = 1e-4 * max(float(gradient.abs().max()) for gradient in expected.values())
    errors = {}
    for name, parameter in engine.deepspeed.module.named_parameters():
        if parameter.requires_grad:
            found = safe_get_full_grad(parameter)
            assert found is not None, f"{case}: no gradient of {name}"
            difference = (found.reshape(expected[name].shape) - expected[name]).abs().max()
            errors[name] = float(difference / expected[name].abs().max().clamp(min=floor))
    assert errors.keys() == expected.keys()
    engine.update(learning_rate=0.0)
    where = max(errors, key=errors.__getitem__)
    return Found(error=errors[where], where=where, loss=float(loss) / case.num_ranks, expected_loss=expected_loss)


def main(cases_file: str, output: str) -> None:
    torch.set_num_threads(1)
    cases = [Case(**case) for case in json.loads(Path(cases_file).read_text())]
    cases = [case for case in cases if case.num_ranks == int(os.environ["WORLD_SIZE"])]
    for case in cases:
        reference(case.variant)
    dist.init_process_group("gloo")
    gc.freeze()  # what the imports made need not be searched again
    found = []
    for _, alike in itertools.groupby(cases, key=lambda case: (case.variant, case.zero_stage)):
        same = list(alike)
        engine = build(same[0])
        found += [[str(case), asdict(compare(case, engine))] for case in same]
        del engine
        gc.collect()  # engines are held by cycles
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
