"""Draws depend on (seed, sample, epoch, stream) and on nothing else."""

import hashlib

import pytest
import torch

from training import random

IDS = torch.tensor([3, -5, 2**62 + 1, 0])
EPOCHS = torch.tensor([0, 0, 7, 1])
MASK = (1 << 64) - 1


def splitmix_bits(seed: int, sample_id: int, epoch: int, stream: str, index: int) -> int:
    """The documented definition in Python's unbounded integers."""

    def mix(x: int) -> int:
        x &= MASK
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        return x ^ (x >> 31)

    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    state = mix(mix(mix((seed ^ key) & MASK) + sample_id) + epoch)
    return mix(state + (index + 1) * 0x9E3779B97F4A7C15)


def test_draws_equal_the_definition_in_unbounded_integers() -> None:
    drawn = random.bits(-9, IDS, EPOCHS, "mask", 5)
    for row, (sample_id, epoch) in enumerate(zip(IDS.tolist(), EPOCHS.tolist(), strict=True)):
        for index in range(5):
            assert drawn[row, index].item() & MASK == splitmix_bits(-9, sample_id, epoch, "mask", index)
    top24 = torch.tensor([[splitmix_bits(-9, 3, 0, "mask", i) >> 40 for i in range(5)]])
    assert torch.equal(random.uniform(-9, IDS[:1], EPOCHS[:1], "mask", 5), (top24.double() / 2**24).float())


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together = random.uniform(1, IDS, EPOCHS, "crop", 4)
    for row in range(4):
        assert torch.equal(together[row : row + 1], random.uniform(1, IDS[row, None], EPOCHS[row, None], "crop", 4))


def test_more_draws_begin_with_the_same_draws() -> None:
    assert torch.equal(random.uniform(1, IDS, EPOCHS, "crop", 9)[:, :4], random.uniform(1, IDS, EPOCHS, "crop", 4))


def test_draws_are_uniform_and_uncorrelated() -> None:
    n = 200_000
    ids = torch.arange(n // 4)
    drawn = random.uniform(0, ids, torch.zeros_like(ids), "x", 4)
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    # Chi-square with 19 degrees of freedom exceeds 43.8 with probability 0.001; the draw is fixed, so never flaky.
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 43.8
    assert drawn.min() >= 0
    assert drawn.max() < 1
    correlation = torch.corrcoef(drawn.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0]]))[0, 1]
    assert neighbours.abs() < 0.02


@pytest.mark.parametrize("change", ["seed", "sample", "epoch", "stream"])
def test_every_part_of_the_key_matters(change: str) -> None:
    ids, epochs = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    base = random.uniform(0, ids, epochs, "a", 8).flatten()
    other = random.uniform(
        1 if change == "seed" else 0,
        ids + 1000 * (change == "sample"),
        epochs + (change == "epoch"),
        "b" if change == "stream" else "a",
        8,
    ).flatten()
    # 8,000 independent pairs: the correlation's deviation is 0.011.
    assert torch.corrcoef(torch.stack([base, other]))[0, 1].abs() < 0.045
