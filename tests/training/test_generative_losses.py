"""Pixels, masked words and SimCLR: numbers worked out by hand, and a naive loop from each paper's equation."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import gather
from training.losses.masked_text import masked_text
from training.losses.pixels import denormalised_patches, normalised_patches, patch_error, patchify, unpatchify
from training.losses.simclr import simclr


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_patches_are_cut_row_by_row_and_put_together_again() -> None:
    pixels = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6)
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 9, 12)
    for row in range(3):
        for column in range(3):
            cell = pixels[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[1, 3 * row + column], cell.permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 2), pixels)


def test_patch_error_equals_the_hand_computed_case() -> None:
    # Two patches of two values: errors (1, 3) and (0, 2), mean squares (1 + 9) / 2 = 5 and (0 + 4) / 2 = 2.
    loss = patch_error(torch.tensor([[[1.0, 3.0], [0.0, 2.0]]]), torch.zeros(1, 2, 2))
    assert loss.sum.item() == 7.0
    assert loss.count.item() == 2


def test_normalised_patches_equal_the_hand_computed_case() -> None:
    # (1, 2, 3, 6): mean 3, unbiased variance (4 + 1 + 0 + 9) / 3 = 14 / 3. A flat patch is 0 everywhere.
    patches = torch.tensor([[[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]])
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(14 / 3)
    normalised = normalised_patches(patches)
    torch.testing.assert_close(normalised[0, 0], expected)
    assert torch.equal(normalised[0, 1], torch.zeros(4))
    torch.testing.assert_close(denormalised_patches(normalised, patches), patches)


def test_patch_error_has_the_gradient_of_eq_3() -> None:
    prediction, target = noise(2, 3, 4, seed=0).requires_grad_(), noise(2, 3, 4, seed=1).requires_grad_()
    naive = prediction.detach().clone().requires_grad_()
    loss = patch_error(prediction, target)
    (loss.sum / loss.count).backward()
    total = torch.zeros(())
    for i in range(2):
        for k in range(3):
            for j in range(4):
                total = total + (naive[i, k, j] - target[i, k, j].detach()) ** 2 / (2 * 3 * 4)
    total.backward()
    assert loss.sum.item() / loss.count.item() == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(prediction.grad, naive.grad)
    assert target.grad is None


def test_masked_text_equals_the_hand_computed_case() -> None:
    # Logits (0, log 3) give probabilities (1/4, 3/4): -log(3/4) for word 1, -log(1/4) for word 0; no more words.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss = masked_text(logits, torch.tensor([1, 0]))
    assert loss.sum.item() == pytest.approx(math.log(4 / 3) + math.log(4), rel=1e-6)
    assert loss.count.item() == 2


def test_masked_text_has_the_gradient_of_eq_4() -> None:
    ids, counted = torch.tensor([[4, 0, 2], [1, 1, 3]]), torch.tensor([[True, True, False], [True, False, False]])
    logits = noise(2, 3, 5, seed=2).requires_grad_()
    naive = logits.detach().clone().requires_grad_()
    loss = masked_text(logits[counted], ids[counted])
    (loss.sum / loss.count).backward()
    total = torch.zeros(())
    for n, j in [(0, 0), (0, 1), (1, 0)]:
        exponentials = torch.exp(naive[n, j])
        total = total - torch.log(exponentials[ids[n, j]] / exponentials.sum()) / 3
    total.backward()
    assert loss.count.item() == 3
    assert loss.sum.item() / 3 == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, naive.grad)


def test_captions_without_words_give_a_zero_that_still_has_its_graph() -> None:
    logits, no_word = noise(2, 1, 5, seed=3).requires_grad_(), torch.zeros(2, 1, dtype=torch.bool)
    loss = masked_text(logits[no_word], torch.zeros(2, 1, dtype=torch.int64)[no_word])
    assert loss.sum.item() == loss.count.item() == 0
    loss.sum.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    loss = simclr(a, b, gather(a), gather(b), temperature=temperature)
    assert loss.count.item() == len(a)
    return loss.sum / loss.count


def test_simclr_equals_the_hand_computed_case() -> None:
    # Both views of two pictures are the axes: a view meets its other self (1), and both views of the other (0, 0).
    # At temperature 0.5 every view's loss is log((e^2 + 2) / e^2) = log(1 + 2 e^-2) = 0.239540.
    axes = torch.eye(2)
    assert contrast(axes, axes, 0.5).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-6)


def test_simclr_has_the_value_and_gradients_of_the_papers_equation() -> None:
    a, b = (functional.normalize(noise(4, 3, seed=seed), dim=1) for seed in (4, 5))
    leaves = [a.requires_grad_(), b.requires_grad_()]
    naive_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = contrast(*leaves, 0.1)
    # Chen et al. eq. 1: 2N views z_1 .. z_2N; l(i, j) = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t).
    views = torch.cat(naive_leaves)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        j = (i + 4) % 8
        rest = sum(torch.exp(views[i] @ views[k] / 0.1) for k in range(8) if k != i)
        total = total - torch.log(torch.exp(views[i] @ views[j] / 0.1) / rest) / 8
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    loss.backward()
    total.backward()
    for leaf, naive_leaf in zip(leaves, naive_leaves, strict=True):
        # float32 against float64: eps 1.2e-7 times logits of up to 10.
        torch.testing.assert_close(leaf.grad, naive_leaf.grad.float(), rtol=1e-4, atol=1e-6)
