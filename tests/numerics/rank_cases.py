"""What one rank of a world computes; the same cases run in one process with the whole batch.

    python rank_cases.py RANK WORLD_SIZE RENDEZVOUS_FILE OUTPUT_FILE

A case takes this rank's rows of a fixed global batch and returns tensors, gradients among them. Nothing but gloo and
plain averaging of gradients is used, so what is tested is the losses' own arithmetic.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist

from training.accumulation import accumulate
from training.data.tokenizer import Tokenizer
from training.losses.distributed import Gathered, LossSum, gather, normalise, rank, world_size
from training.methods import METHODS, Batch, Method, ModelConfig, build_method
from training.methods import rils as rils_module

GLOBAL_BATCH = 6
CAPTIONS = ["a red cat", "two dogs", "a green house in the sun", "cat", "", "a moon"]
MODEL = ModelConfig.model_validate(
    {
        "vision": {
            "size": "nano",
            "width": 16,
            "depth": 2,
            "heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "stem": "conv",
        },
        "text": {"width": 16, "depth": 1, "heads": 2, "context_length": 16, "vocabulary": "compact"},
        "embed_dim": 8,
    }
)


def own_rows() -> slice:
    share = GLOBAL_BATCH // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def build(name: str, **keys: object) -> Method:
    tokenizer = Tokenizer.build(CAPTIONS, context_length=16, vocabulary="compact")
    torch.manual_seed(0)
    return build_method(name, METHODS[name].config_type.model_validate(keys), MODEL, tokenizer)


def batch() -> Batch:
    images = torch.randint(0, 256, (GLOBAL_BATCH, 20, 20, 3), generator=torch.Generator().manual_seed(1))
    rows = own_rows()
    return Batch(
        images=images.to(torch.uint8)[rows],
        captions=CAPTIONS[rows],
        sample_ids=(torch.arange(GLOBAL_BATCH) * 977 - 5)[rows],
        epoch=torch.tensor([0, 0, 0, 0, 1, 1])[rows],
        step=3,
        seed=11,
    )


def averaged_gradients(method: Method) -> dict[str, Tensor]:
    """What data-parallel training hands to its optimizer."""
    gradients = {}
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part in the loss"
        gradient = parameter.grad.clone()
        if world_size() > 1:
            dist.all_reduce(gradient)
        gradients[f"gradient of {name}"] = gradient / world_size()
    return gradients


def step_of(method: Method) -> dict[str, Tensor]:
    output = method(batch())
    output.loss.backward()
    return {**output.losses, **output.metrics, **averaged_gradients(method)}


def clip_global() -> dict[str, Tensor]:
    return step_of(build("clip"))


def clip_local() -> dict[str, Tensor]:
    return step_of(build("clip", scope="local"))


def clip_before_it_turns_global() -> dict[str, Tensor]:
    return step_of(build("clip", local_steps=batch().step + 1))


def clip_after_it_turned_global() -> dict[str, Tensor]:
    return step_of(build("clip", local_steps=batch().step))


def siglip() -> dict[str, Tensor]:
    return step_of(build("siglip"))


def siglip_in_three_parts() -> dict[str, Tensor]:
    """Parts and ranks at once, without an engine."""
    method = build("siglip")
    output = accumulate(method, batch(), 3, method, lambda loss, last: loss.backward())
    return {**output.losses, **output.metrics, **averaged_gradients(method)}


def rils() -> dict[str, Tensor]:
    return step_of(build("rils", reconstruction_weight={"value": 0.5}, use_set_c=False))


def rils_with_set_c_empty_on_the_last_rank() -> dict[str, Tensor]:
    """Only the first half of the global batch is matched: nothing of it lies on the second of two ranks."""

    def first_half(image_BE: Tensor, texts: Gathered) -> Tensor:
        return torch.arange(GLOBAL_BATCH)[own_rows()] < GLOBAL_BATCH // 2

    with mock.patch.object(rils_module, "matched", first_half):
        return step_of(build("rils", reconstruction_weight={"value": 2.0}))


def rils_with_set_c_empty_everywhere() -> dict[str, Tensor]:
    with mock.patch.object(
        rils_module, "matched", lambda image_BE, texts: torch.zeros(len(image_BE), dtype=torch.bool)
    ):
        return step_of(build("rils", reconstruction_weight={"value": 2.0}))


def gather_backward() -> dict[str, Tensor]:
    """Rank r asks (r + 1) * 10 + row of each gathered row; a row's gradient is what all ranks ask of it."""
    whole = torch.arange(GLOBAL_BATCH * 2, dtype=torch.float32).view(GLOBAL_BATCH, 2)
    own = whole[own_rows()].clone().requires_grad_()
    gathered = gather(own)
    asked = (rank() + 1) * 10 + torch.arange(GLOBAL_BATCH, dtype=torch.float32)
    (gathered.features * asked[:, None]).sum().backward()
    assert own.grad is not None
    return {"features": gathered.features.detach(), "offset": torch.tensor(gathered.offset), "gradient": own.grad}


def normalise_uneven() -> dict[str, Tensor]:
    """The first rank has 1 term of 8, the last 3 terms that sum to 4; another loss has no term anywhere."""
    first = rank() == 0
    total = torch.tensor(8.0 if first else 4.0, requires_grad=True)
    losses = {
        "uneven": LossSum(total, torch.tensor(1 if first else 3)),
        "absent": LossSum(total * 0, torch.tensor(0)),
    }
    result = normalise(losses)
    (result["uneven"].loss + result["absent"].loss).backward()
    assert total.grad is not None
    return {"value": result["uneven"].value, "absent": result["absent"].value, "gradient": total.grad}


CASES: dict[str, Callable[[], dict[str, Tensor]]] = {
    case.__name__: case
    for case in (
        clip_global,
        clip_local,
        clip_before_it_turns_global,
        clip_after_it_turned_global,
        siglip,
        siglip_in_three_parts,
        rils,
        rils_with_set_c_empty_on_the_last_rank,
        rils_with_set_c_empty_everywhere,
        gather_backward,
        normalise_uneven,
    )
}


def main(rank_text: str, size_text: str, rendezvous: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank_text), world_size=int(size_text))
    torch.save({name: case() for name, case in CASES.items()}, Path(output))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
