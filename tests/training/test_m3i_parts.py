"""The parts of M3I: who is mixed with whom, which pixels, where a patch of one view lies in another, and its losses."""

import math

import pytest
import torch
from torch import Tensor

from training.data.transforms import resample
from training.losses.classification import classification
from training.losses.feature_prediction import feature_prediction, outer_products, plain_norm
from training.methods.m3i_balance import Balance
from training.methods.m3i_mix import MaskKind, hidden_cells, mix, partners, seen_features
from training.models.positions import sincos_2d
from training.models.relative import own_places, relative_places, sincos_places

IDS = torch.arange(48) * 7919 - 3
EPOCH = torch.zeros(48, dtype=torch.int64)


@pytest.mark.parametrize("group", [2, 3, 4, 48])
def test_partners_are_one_cycle_through_every_group(group: int) -> None:
    sigma = partners(0, IDS, EPOCH, group=group)
    for first in range(0, 48, group):
        place, visited = first, []
        for _ in range(group):
            place = int(sigma[place])
            visited.append(place)
        assert sorted(visited) == list(range(first, first + group))
        assert place == first


def test_partners_do_not_depend_on_how_the_batch_is_cut() -> None:
    whole = partners(5, IDS, EPOCH, group=4)
    parts = [partners(5, IDS[first : first + 12], EPOCH[:12], group=4) + first for first in range(0, 48, 12)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(partners(5, IDS, EPOCH + 1, group=4), whole)
    with pytest.raises(ValueError, match="46 samples cannot be mixed in groups of 4"):
        partners(5, IDS[:46], EPOCH[:46], group=4)


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize(("grid", "ratio", "num_hidden"), [(14, 0.6, 118), (4, 0.6, 10), (2, 0.01, 1), (2, 0.99, 3)])
def test_every_sample_hides_the_same_number_of_cells(kind: MaskKind, grid: int, ratio: float, num_hidden: int) -> None:
    hidden = hidden_cells(0, IDS, EPOCH, grid=grid, ratio=ratio, kind=kind)
    assert hidden.shape == (48, grid, grid)
    assert (hidden.sum((1, 2)) == num_hidden).all()  # 118 of 196 is SiameseIM's
    alone = hidden_cells(0, IDS[7, None], EPOCH[7, None], grid=grid, ratio=ratio, kind=kind)
    assert torch.equal(alone[0], hidden[7])


def test_blocks_are_more_of_a_piece_than_random_cells() -> None:
    def like_their_neighbours(kind: MaskKind) -> float:
        hidden = hidden_cells(0, IDS, EPOCH, grid=14, ratio=0.6, kind=kind)
        return (hidden[:, 1:] == hidden[:, :-1]).float().mean().item()

    # Independent cells agree with probability 0.6^2 + 0.4^2 = 0.52; a side of a rectangle is where blocks do not.
    assert like_their_neighbours("random") == pytest.approx(0.52, abs=0.02)
    assert like_their_neighbours("block") > 0.75
    shares = hidden_cells(0, torch.arange(500), torch.zeros(500, dtype=torch.int64), grid=14, ratio=0.6, kind="block")
    assert shares.float().mean(0).min() > 0.04  # rectangles lie inside: corners are seldom hidden, but sometimes


def test_mix_takes_hidden_cells_from_the_second_picture() -> None:
    first, second = torch.zeros(1, 3, 6, 6), torch.ones(1, 3, 6, 6)
    hidden = torch.tensor([[[True, False, False], [False, False, False], [False, False, True]]])
    mixed = mix(first, second, hidden)
    assert mixed[0, :, :2, :2].eq(1).all()
    assert mixed[0, :, 4:, 4:].eq(1).all()
    assert mixed.sum() == 3 * 8


def test_features_stand_for_the_cells_that_show_a_picture() -> None:
    shown = torch.zeros(3, 4, 4, dtype=torch.bool)
    shown[0, :2, :2] = True  # the whole first quarter
    shown[1, 0, 0] = shown[1, 0, 1] = shown[1, 2, 2] = True  # half of the first, a fourth of the last
    shown[2, 3, 3] = True  # never half of anything
    assert seen_features(shown, 2).tolist() == [
        [True, False, False, False],
        [True, False, False, False],
        [False, False, False, True],
    ]
    assert torch.equal(seen_features(shown, 4), shown.flatten(1))


def test_relative_places_by_hand() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert torch.equal(own_places(2, torch.device("cpu"))[:, :2], torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]))
    # The target is the upper right quarter: its first patch is 1/8 wide, centred at row 1/16, column 9/16.
    quarter = relative_places(whole, torch.tensor([[0.0, 0.5, 0.5, 1.0]]), input_grid=4, target_grid=4)
    assert quarter[0, 0].tolist() == [-0.25, 1.75, 0.5, 0.5]
    assert quarter[0, 15].tolist() == [1.25, 3.25, 0.5, 0.5]
    # The input is mirrored: what is first in the target is last in the input, and runs the other way.
    mirrored = relative_places(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), whole, input_grid=4, target_grid=4)
    assert mirrored[0, 0].tolist() == [0.0, 3.0, 1.0, -1.0]
    # From a view of the lower half to one of the upper half: all of it lies above.
    above = relative_places(torch.tensor([[0.5, 0, 1, 1]]), torch.tensor([[0, 0, 0.5, 1]]), input_grid=4, target_grid=4)
    assert above[0, :, 0].tolist() == [row for row in (-4.0, -3.0, -2.0, -1.0) for _ in range(4)]


def test_relative_places_are_where_the_pixels_are() -> None:
    """Of a picture of coordinates, the input view's values at the places are the target view's values."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    coordinates = torch.stack([rows, columns, torch.zeros(64, 64)], dim=2)[None].expand(3, -1, -1, -1)
    boxes = torch.tensor([[0.1, 0.1, 0.7, 0.9], [0.2, 0.9, 0.8, 0.3], [0.3, 0.2, 0.9, 0.6]])
    others = torch.tensor([[0.3, 0.2, 0.9, 0.6], [0.1, 0.1, 0.7, 0.9], [0.2, 0.9, 0.8, 0.3]])

    def patch_means(box: Tensor) -> Tensor:
        view = resample(coordinates.contiguous(), box, 32)[:, :2]
        return torch.nn.functional.avg_pool2d(view, 8).flatten(2).transpose(1, 2)  # [3, 16, 2]

    seen, wanted = patch_means(boxes), patch_means(others)
    places = relative_places(boxes, others, input_grid=4, target_grid=4)
    for axis, last in ((0, 12), (1, 3)):
        first, end = seen[:, 0, axis], seen[:, last, axis]
        found = first[:, None] + places[..., axis] * (end - first)[:, None] / 3
        # Of 64 pixels; a discrete triangle filter does not keep a ramp exactly.
        torch.testing.assert_close(found, wanted[..., axis], rtol=0, atol=0.06)


def test_sines_of_own_places_are_the_encoders_positions_and_the_size() -> None:
    places = own_places(3, torch.device("cpu"))
    sines = sincos_places(places[None], 32)[0]
    row, column = sines[:, :8], sines[:, 8:16]
    torch.testing.assert_close(torch.cat([column, row], dim=1), sincos_2d(3, 16), rtol=1e-5, atol=1e-6)
    # Height and width of 1: sin and cos of 1, 0.1, 0.01, 0.001.
    angle = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(sines[4, 16:24], torch.cat([angle.sin(), angle.cos()]))


def test_feature_prediction_equals_the_hand_computed_case() -> None:
    prediction, target = torch.tensor([[[1.0, 2.0], [9.0, 9.0]]]), torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])
    counted = torch.tensor([[True, False]])
    loss = feature_prediction(prediction, target, counted)
    assert (loss.sum.item(), loss.count.item()) == (2.5, 1)  # (1 + 4) / 2
    # Negatives (1, 0) and (1, 2): squares of products 1 and 25, mean 13; 2.5 + 0.02 * 13 / 2.
    negatives = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])
    correlation = outer_products(negatives) / 2
    loss = feature_prediction(prediction, target, counted, correlation_DD=correlation, negative_weight=0.02)
    assert loss.sum.item() == pytest.approx(2.63)


def test_feature_prediction_equals_a_loop_over_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    p, t, z = (torch.randn(3, 5, 4, generator=generator) for _ in range(3))
    counted = torch.rand(3, 5, generator=generator) < 0.6
    expected = 0.0
    for b in range(3):
        for n in range(5):
            if counted[b, n]:
                error = sum((p[b, n, d] - t[b, n, d]).item() ** 2 for d in range(4))
                negative = sum(float(p[b, n] @ z[i, j]) ** 2 for i in range(3) for j in range(5)) / 15
                expected += (error + 0.02 * negative) / 4
    found = feature_prediction(p, t, counted, correlation_DD=outer_products(z) / 15, negative_weight=0.02)
    assert found.sum.item() == pytest.approx(expected, rel=1e-5)
    assert found.count.item() == counted.sum().item()


def test_no_gradient_reaches_a_target() -> None:
    p, t = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    counted = torch.ones(1, 2, dtype=torch.bool)
    feature_prediction(p, t, counted, correlation_DD=outer_products(t), negative_weight=1.0).sum.backward()
    assert p.grad is not None
    assert t.grad is None
    assert not plain_norm(t).requires_grad
    torch.testing.assert_close(
        plain_norm(torch.tensor([[[1.0, 3.0]]])), torch.tensor([[[-1.0, 1.0]]]), rtol=1e-4, atol=0
    )


def test_classification_counts_pictures_that_have_a_label() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0], [0.0, 0.0]])
    loss = classification(logits, torch.tensor([1, -1, 0]))
    assert loss.sum.item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert loss.count.item() == 2
    nothing = classification(logits.requires_grad_(), torch.tensor([-1, -1, -1]))
    nothing.sum.backward()
    assert (nothing.sum.item(), nothing.count.item()) == (0.0, 0)


def test_balance_makes_gradients_equally_long() -> None:
    balance = Balance(["short", "long", "silent"])
    x = torch.ones(4, requires_grad=True)

    def gradients() -> dict[str, float]:
        scales = balance.scales()
        weights = {"short": 2.0 * scales["short"], "long": 0.5 * scales["long"]}
        slope = {"short": 0.3, "long": 1.2}
        norms = {}
        for name, weight in weights.items():
            x.grad = None
            (weight * slope[name] * balance.tap(name, x, weight).sum()).backward()
            assert x.grad is not None
            norms[name] = x.grad.norm().item()
        return norms

    assert gradients() == pytest.approx({"short": 2 * 0.3 * 2, "long": 0.5 * 1.2 * 2})
    balance.update()
    # Norms of the unweighted terms are 0.6 and 2.4, their mean 1.5: then lengths are to each other as the weights.
    assert balance.scales() == pytest.approx({"short": 2.5, "long": 0.625, "silent": 1.0})
    assert gradients() == pytest.approx({"short": 2 * 1.5, "long": 0.5 * 1.5})
    assert set(balance.state_dict()) == {"norms"}
