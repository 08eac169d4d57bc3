"""A target network that follows the one being trained: the exponential moving average of its weights.

The copy's parameters are float32, take no gradient and lie where DeepSpeed puts the original's: whole on every rank
for ZeRO 0 to 2, as this rank's part for ZeRO 3. Original and copy are cut alike, so the average is local arithmetic on
the parts; DeepSpeed saves and restores them with the checkpoint.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def momentum_copy(online: M) -> M:
    """Return a copy of freshly built modules, to be moved by `follow` alone."""
    return copy.deepcopy(online).requires_grad_(False)


def momentum_at(step: int, num_steps: int, *, start: float) -> float:
    """The momentum before the forward pass of `step`: half a cosine from `start` at step 0 to 1 at the end."""
    done = min(1.0, step / num_steps)
    return 1.0 - (1.0 - start) * 0.5 * (1.0 + math.cos(math.pi * done))


@torch.no_grad()
def follow(pairs: Iterable[tuple[nn.Parameter, nn.Parameter]], momentum: float) -> None:
    """For each (target, source): target <- momentum * target + (1 - momentum) * source."""
    targets, sources = [], []
    for target, source in pairs:
        targets.append(_part(target, renew=True))
        sources.append(_part(source))
    if targets:
        torch._foreach_lerp_(targets, sources, 1.0 - momentum)


def _part(parameter: Any, *, renew: bool = False) -> Tensor:
    """What this rank holds of a parameter. renew: forget a whole copy that ZeRO 3 has gathered, as it will change."""
    held = parameter
    if hasattr(parameter, "ds_tensor"):
        if renew and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
        held = parameter.ds_tensor
    part: Tensor = held.data
    return part
