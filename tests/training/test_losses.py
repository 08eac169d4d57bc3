"""Each loss against numbers worked out by hand, a naive loop from the paper's equation, and autograd of the latter."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import Gathered, LossSum, gather, normalise
from training.losses.info_nce import info_nce, matched
from training.losses.language_reconstruction import language_reconstruction
from training.losses.siglip import sigmoid_pairs
from training.losses.similarity import MAX_SCALE, product, scale, unit


def random_unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def contrast(image: Tensor, text: Tensor, factor: Tensor) -> LossSum:
    return info_nce(image, text, gather(image), gather(text), factor)


def test_info_nce_equals_the_hand_computed_case() -> None:
    # Similarities [[1, 0.6], [0, 0.8]] times scale 2 are the logits [[2, 1.2], [0, 1.6]].
    # Rows:    -log(e^2 / (e^2 + e^1.2)) = log(1 + e^-0.8) = 0.371101; log(1 + e^-1.6) = 0.183901
    # Columns:  log(1 + e^-2)   = 0.126928; log(1 + e^-0.4) = 0.513015
    # Sum of halves: (0.371101 + 0.183901 + 0.126928 + 0.513015) / 2 = 0.597473
    loss = contrast(torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor(2.0))
    assert loss.sum.item() == pytest.approx(0.597473, abs=2e-6)
    assert loss.count.item() == 2


def naive_info_nce(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
    """Eq. 5 and 6 of RILS, term by term; the mean."""
    size = len(image)
    i2t = t2i = torch.zeros((), dtype=image.dtype)
    for i in range(size):
        own = torch.exp((image[i] * text[i]).sum() * factor)
        i2t = i2t - torch.log(own / sum(torch.exp((image[i] * text[j]).sum() * factor) for j in range(size))) / size
        t2i = t2i - torch.log(own / sum(torch.exp((text[i] * image[j]).sum() * factor) for j in range(size))) / size
    return (i2t + t2i) / 2


def test_info_nce_has_the_value_and_gradients_of_the_papers_equations() -> None:
    image, text = random_unit(5, 4, seed=0), random_unit(5, 4, seed=1)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(7.0, requires_grad=True)]
    naive_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = contrast(*leaves)
    expected = naive_info_nce(*naive_leaves)
    assert loss.sum.item() / loss.count.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss.sum / loss.count).backward()
    expected.backward()
    for leaf, naive_leaf in zip(leaves, naive_leaves, strict=True):
        # float32 against float64: eps 1.2e-7 times logits of up to 7.
        torch.testing.assert_close(leaf.grad, naive_leaf.grad.float(), rtol=1e-5, atol=1e-6)


def test_siglip_equals_the_hand_computed_case() -> None:
    # Similarities [[1, 0.6], [0, 0.8]], t = 2, b = -1: logits [[1, 0.2], [-1, 0.6]], own pairs on the diagonal.
    # -log sigmoid(1) = log(1 + e^-1) = 0.313262;  -log sigmoid(-0.2) = log(1 + e^0.2) = 0.798139
    # -log sigmoid(-(-1)) = log(1 + e^-1) = 0.313262;  -log sigmoid(0.6) = log(1 + e^-0.6) = 0.437488
    # Sum: 1.862151
    loss = sigmoid_pairs(
        torch.eye(2), gather(torch.tensor([[1.0, 0.0], [0.6, 0.8]])), torch.tensor(2.0), torch.tensor(-1.0)
    )
    assert loss.sum.item() == pytest.approx(1.862151, abs=2e-6)
    assert loss.count.item() == 2


def naive_siglip(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """Eq. 1 of SigLIP, term by term; the mean over pictures."""
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if i == j else -1
            total = total - torch.log(1 / (1 + torch.exp(z * (-factor * (image[i] * text[j]).sum() - bias))))
    return total / len(image)


def test_siglip_has_the_value_and_gradients_of_the_papers_equation() -> None:
    leaves = [random_unit(5, 4, seed=0), random_unit(5, 4, seed=1), torch.tensor(7.0), torch.tensor(-2.0)]
    naive_leaves = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    image, text, factor, bias = leaves
    loss = sigmoid_pairs(image, gather(text), factor, bias)
    expected = naive_siglip(*naive_leaves)
    assert loss.sum.item() / loss.count.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss.sum / loss.count).backward()
    expected.backward()
    for leaf, naive_leaf in zip(leaves, naive_leaves, strict=True):
        # float32 against float64: eps 1.2e-7 times logits of up to 9.
        torch.testing.assert_close(leaf.grad, naive_leaf.grad.float(), rtol=1e-5, atol=1e-6)


def test_reconstruction_equals_the_hand_computed_case() -> None:
    # Prototypes are the axes. Target (1, 0) at temperature 0.5: p = softmax(2, 0) = (0.880797, 0.119203).
    # Prediction (0, 1) at temperature 1: q = softmax(0, 1) = (0.268941, 0.731059).
    # KL = 0.880797 log(0.880797 / 0.268941) + 0.119203 log(0.119203 / 0.731059) = 1.044920 - 0.216194 = 0.828726
    loss = language_reconstruction(
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[[0.0, 1.0]]]),
        torch.eye(2),
        torch.tensor([True]),
        target_temperature=0.5,
        prediction_temperature=1.0,
    )
    assert loss.sum.item() == pytest.approx(0.828726, abs=2e-6)
    assert loss.count.item() == 1


def naive_reconstruction(target: Tensor, prediction: Tensor, prototypes: Tensor, counted: list[bool]) -> Tensor:
    """Eq. 8 and 9 of RILS, term by term, temperatures 0.04 and 0.1: the cross-entropy, mean over counted patches."""
    total = torch.zeros((), dtype=prediction.dtype)
    for i in range(len(target)):
        for k in range(target.shape[1]):
            p = torch.stack([torch.exp((target[i, k] * z).sum() / 0.04) for z in prototypes]).detach()
            q = torch.stack([torch.exp((prediction[i, k] * z).sum() / 0.1) for z in prototypes])
            if counted[i]:
                total = total - ((p / p.sum()) * torch.log(q / q.sum())).sum()
    return total / (sum(counted) * target.shape[1])


def test_reconstruction_has_the_gradients_of_the_papers_equation_and_its_value_less_the_targets_entropy() -> None:
    counted = [True, False, True]
    target, prediction, prototypes = (
        random_unit(3, 4, 6, seed=2),
        random_unit(3, 4, 6, seed=3),
        random_unit(5, 6, seed=4),
    )
    leaves = [prediction.requires_grad_(), prototypes.requires_grad_()]
    naive_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    target.requires_grad_()
    loss = language_reconstruction(
        target, *leaves, torch.tensor(counted), target_temperature=0.04, prediction_temperature=0.1
    )
    expected = naive_reconstruction(target.detach().double(), *naive_leaves, counted)
    p = (target.detach().double() @ naive_leaves[1].detach().T / 0.04).softmax(-1)
    entropy = -(p * p.log()).sum(-1)[counted].mean()
    assert loss.count.item() == 8
    assert loss.sum.item() / 8 == pytest.approx((expected - entropy).item(), rel=1e-5)
    (loss.sum / loss.count).backward()
    expected.backward()
    assert target.grad is None
    for leaf, naive_leaf in zip(leaves, naive_leaves, strict=True):
        # float32 against float64: eps 1.2e-7 times logits of up to 25.
        torch.testing.assert_close(leaf.grad, naive_leaf.grad.float(), rtol=1e-4, atol=1e-5)


def test_reconstruction_of_the_target_itself_at_its_temperature_costs_nothing() -> None:
    patches, prototypes = random_unit(2, 3, 4, seed=5), random_unit(6, 4, seed=6)
    loss = language_reconstruction(
        patches, patches, prototypes, torch.ones(2), target_temperature=0.1, prediction_temperature=0.1
    )
    assert loss.sum.item() == pytest.approx(0.0, abs=1e-5)


def test_a_batch_without_matched_pictures_gives_a_zero_that_still_has_its_graph() -> None:
    prediction = random_unit(2, 3, 4, seed=7).requires_grad_()
    loss = language_reconstruction(
        random_unit(2, 3, 4, seed=8),
        prediction,
        random_unit(6, 4, seed=9),
        torch.zeros(2, dtype=torch.bool),
        target_temperature=0.04,
        prediction_temperature=0.1,
    )
    normalised = normalise({"reconstruction": loss})["reconstruction"]
    normalised.loss.backward()
    assert normalised.value.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_a_picture_is_matched_when_no_text_is_closer_than_its_own() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    # The second picture is closer to the first text; the third ties with an equal caption, which is no mistake.
    assert matched(images, gather(texts)).tolist() == [True, False, True]
    # Encoded in another part, behind other padding, an equal caption comes out equal but for rounding.
    rounded = torch.nn.functional.normalize(texts + torch.tensor([[0.0, 0.0], [-3e-7, 0.0], [0.0, 0.0]]), dim=1)
    for image in torch.nn.functional.normalize(torch.tensor([[1.0, 1.2], [-1.0, 1.2]]), dim=1):
        assert matched(image.expand(3, -1), gather(rounded)).tolist() == [False, True, True]


def test_rows_of_a_later_rank_are_matched_with_its_own_texts() -> None:
    texts = Gathered(features=torch.eye(4), offset=2)
    assert matched(torch.eye(4)[2:], texts).tolist() == [True, True]
    assert matched(torch.eye(4)[:2], texts).tolist() == [False, False]


def test_scale_is_at_most_100_and_an_overshoot_can_come_back() -> None:
    def gradient(log_scale: float, direction: float) -> float:
        parameter = torch.tensor(log_scale, requires_grad=True)
        (direction * scale(parameter)).backward()
        assert scale(parameter).item() <= MAX_SCALE * (1 + 1e-6)
        assert parameter.grad is not None
        return parameter.grad.item()

    assert gradient(math.log(20), -1.0) == pytest.approx(-20)
    assert gradient(5.0, -1.0) == 0  # descent would raise it further: dropped
    assert gradient(5.0, 1.0) == pytest.approx(100)  # descent lowers it: kept


def test_features_and_logits_stay_float32_under_autocast() -> None:
    x, y = torch.randn(3, 8), random_unit(3, 8, seed=10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unit(x), functional.normalize(x, dim=-1))
        inside = product(y, y)
    assert torch.equal(inside, y @ y.T)


def test_normalise_divides_each_loss_by_its_own_count() -> None:
    losses = {"a": LossSum(torch.tensor(6.0), torch.tensor(4)), "b": LossSum(torch.tensor(0.0), torch.tensor(0))}
    result = normalise(losses)
    assert (result["a"].loss.item(), result["a"].value.item()) == (1.5, 1.5)
    assert (result["b"].loss.item(), result["b"].value.item()) == (0.0, 0.0)
