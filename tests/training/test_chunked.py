"""Tiles of any size give the loss and the gradients of the dense matrix, and never hold it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.losses import chunked
from training.losses.distributed import Gathered
from training.losses.info_nce import info_nce, matched
from training.losses.language_reconstruction import language_reconstruction
from training.losses.siglip import sigmoid_pairs

NUM_ROWS, NUM_COLUMNS, WIDTH, OFFSET = 11, 30, 6, 7


def random_unit(*shape: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(params=[1, 4, 11, 64], ids=lambda rows: f"{rows}rows")
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of one row, ragged ones, exactly one tile, and one that is larger than the matrix."""
    monkeypatch.setattr(chunked, "TILE_BYTES", 0)
    monkeypatch.setattr(chunked, "MIN_TILE_ROWS", request.param)
    return request.param


def dense_info_nce(image: Tensor, text: Tensor, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    own = OFFSET + torch.arange(len(image))
    i2t = functional.cross_entropy(scale * image @ texts.T, own, reduction="sum")
    return (i2t + functional.cross_entropy(scale * text @ images.T, own, reduction="sum")) / 2


def dense_siglip(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = -torch.ones(len(image), len(texts), dtype=image.dtype)
    sign[torch.arange(len(image)), OFFSET + torch.arange(len(image))] = 1
    return -functional.logsigmoid(sign * (scale * image @ texts.T + bias)).sum()


def dense_reconstruction(target: Tensor, prediction: Tensor, prototypes: Tensor, counted: Tensor) -> Tensor:
    p = (target @ prototypes.detach().T / 0.04).softmax(-1)
    log_q = (prediction @ prototypes.T / 0.1).log_softmax(-1)
    return ((p * (p.log() - log_q)).sum((1, 2)) * counted).sum()


def assert_same(
    tiled: Callable[..., Tensor], dense: Callable[..., Tensor], leaves: list[Tensor], fixed: tuple[Tensor, ...] = ()
) -> None:
    """Value and gradients, against float64; 0.3 is an upstream gradient other than 1."""
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.double().requires_grad_() for leaf in leaves]
    found, expected = tiled(*ours), dense(*theirs)
    (0.3 * found).backward()
    (0.3 * expected).backward()
    # float32 against float64: eps 1.2e-7 times logits of up to 25 in sums of some hundred terms.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad.double(), their.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def everyone(features: Tensor) -> Gathered:
    return Gathered(features=features, offset=OFFSET)


def test_tiles_of_info_nce_equal_the_dense_matrix(tile_rows: int) -> None:
    leaves = [
        random_unit(NUM_ROWS, WIDTH, seed=0),
        random_unit(NUM_ROWS, WIDTH, seed=1),
        random_unit(NUM_COLUMNS, WIDTH, seed=2),
        random_unit(NUM_COLUMNS, WIDTH, seed=3),
        torch.tensor(14.0),
    ]
    assert_same(lambda i, t, ii, tt, s: info_nce(i, t, everyone(ii), everyone(tt), s).sum, dense_info_nce, leaves)


def test_tiles_of_siglip_equal_the_dense_matrix(tile_rows: int) -> None:
    leaves = [
        random_unit(NUM_ROWS, WIDTH, seed=0),
        random_unit(NUM_COLUMNS, WIDTH, seed=1),
        torch.tensor(10.0),
        torch.tensor(-3.0),
    ]
    assert_same(lambda i, tt, s, b: sigmoid_pairs(i, everyone(tt), s, b).sum, dense_siglip, leaves)


def test_tiles_of_the_reconstruction_equal_the_dense_matrix(tile_rows: int) -> None:
    target = random_unit(5, 4, WIDTH, seed=0)
    counted = torch.tensor([True, False, True, True, False])

    def tiled(prediction: Tensor, prototypes: Tensor) -> Tensor:
        return language_reconstruction(
            target, prediction, prototypes, counted, target_temperature=0.04, prediction_temperature=0.1
        ).sum

    def dense(prediction: Tensor, prototypes: Tensor) -> Tensor:
        return dense_reconstruction(target.double(), prediction, prototypes, counted)

    assert_same(tiled, dense, [random_unit(5, 4, WIDTH, seed=1), random_unit(NUM_COLUMNS, WIDTH, seed=2)])


def test_matched_pictures_do_not_depend_on_the_tiles(tile_rows: int) -> None:
    texts = random_unit(NUM_COLUMNS, WIDTH, seed=0)
    images = texts[OFFSET : OFFSET + NUM_ROWS].clone()
    images[::2] = random_unit(len(images[::2]), WIDTH, seed=1)
    own = OFFSET + torch.arange(NUM_ROWS)
    expected = (images @ texts.T).argmax(1) == own
    assert 0 < expected.sum() < NUM_ROWS
    assert torch.equal(matched(images, everyone(texts)), expected)


def test_pairs_that_do_not_take_part_are_neither_asked_nor_offered() -> None:
    valid = torch.tensor([True, False, True, True, False, True])
    image, text = random_unit(6, WIDTH, seed=0), random_unit(6, WIDTH, seed=1)
    rows = slice(2, 5)  # a part of which the last pair does not take part

    def part(values: Tensor) -> Gathered:
        return Gathered(features=values, offset=2)

    found = info_nce(image[rows], text[rows], part(image), part(text), torch.tensor(9.0), part(valid))
    logits = 9.0 * image[valid] @ text[valid].T
    own = torch.tensor([1, 2])  # rows 2 and 3 among the valid ones: 0, 2, 3, 5
    expected = functional.cross_entropy(logits[own], own, reduction="sum")
    expected = (expected + functional.cross_entropy(logits.T[own], own, reduction="sum")) / 2
    assert found.count.item() == 2
    assert found.sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_tensor_of_all_pairs_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(chunked, "TILE_BYTES", 0)
    monkeypatch.setattr(chunked, "MIN_TILE_ROWS", 16)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return result

    image, text = (random_unit(256, 8, seed=seed).requires_grad_() for seed in (0, 1))
    bias, scale = torch.tensor(-10.0, requires_grad=True), torch.tensor(9.0, requires_grad=True)
    patches = image.view(64, 4, 8)
    with Watch():
        all_images, all_texts = Gathered(features=image, offset=0), Gathered(features=text, offset=0)
        total = info_nce(image, text, all_images, all_texts, scale).sum
        total = total + sigmoid_pairs(image, all_texts, scale, bias).sum
        total = (
            total
            + language_reconstruction(
                patches, patches, text, torch.ones(64), target_temperature=0.04, prediction_temperature=0.1
            ).sum
        )
        matched(image, all_texts)
        total.backward()
    assert largest == 16 * 256  # a tile; all pairs would be 256 * 256
