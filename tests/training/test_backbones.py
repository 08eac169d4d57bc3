"""Every backbone has the published shape, and DCNv3 computes its paper's equation."""

import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.config import parse
from cluster.errors import RequestError
from training.models import dcnv3
from training.models.config import INTERNIMAGE_SIZES, ModelConfig, VisionConfig
from training.models.dcnv3 import DeformableConv, aggregate_plainly
from training.models.image_encoder import ImageEncoder, build_image_encoder
from training.models.text import TextTransformer

VOCABULARY = 49_408


def encoder(**keys: Any) -> ImageEncoder:
    torch.manual_seed(0)
    return build_image_encoder(VisionConfig.model_validate(keys))


def on_meta(**keys: Any) -> ImageEncoder:
    with torch.device("meta"):
        return encoder(**keys)


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


# Published with learned positions, a class token and a classifier of 1,000 classes, which is added here.
# Ti, S: Touvron et al. 2021 (DeiT), table 1. B, L, H: Dosovitskiy et al. 2021, table 1, whose L is rounded from 304 M.
@pytest.mark.parametrize(
    ("size", "patch", "published"),
    [("Ti", 16, 5.7), ("S", 16, 22.1), ("B", 16, 86.6), ("B", 32, 88.2), ("L", 16, 304.3), ("H", 14, 632.0)],
)
def test_vit_with_its_classifier_has_the_published_number_of_parameters(
    size: str, patch: int, published: float
) -> None:
    vit = on_meta(size=size, patch_size=patch, positions="learned", pooling="class")
    classifier = (vit.width + 1) * 1000 / 1e6
    assert millions(vit) + classifier == pytest.approx(published, rel=0.004)


# Zhai et al. 2022, table 2: 1,011 M and 1,843 M, without classifier.
@pytest.mark.parametrize(("size", "published"), [("g", 1011), ("G", 1843)])
def test_large_vits_have_the_published_number_of_parameters(size: str, published: float) -> None:
    assert millions(on_meta(size=size, patch_size=14)) == pytest.approx(published, rel=0.004)


# Wang et al. 2023, tables 2 and 3; H is published as 1.08 B, and the authors' code builds 1,089.6 M.
@pytest.mark.parametrize(
    ("size", "published", "tolerance"),
    [("T", 30, 0.5), ("S", 50, 0.5), ("B", 97, 0.5), ("L", 223, 0.5), ("XL", 335, 0.5), ("H", 1089.6, 0.1)],
)
def test_internimage_with_its_classifier_has_the_published_number_of_parameters(
    size: str, published: float, tolerance: float
) -> None:
    network = on_meta(size=f"internimage-{size}")
    assert millions(network) + published_head(network.width, huge=size == "H") / 1e6 == pytest.approx(
        published, abs=tolerance
    )


def published_head(width: int, *, huge: bool) -> int:
    """Parameters of the heads that the authors' classifiers put on the backbone."""
    if not huge:  # 1x1 convolution to 1.5 times the width, batch norm, classifier
        hidden = int(1.5 * width)
        return width * hidden + 2 * hidden + (hidden + 1) * 1000
    inner, out = 1024, 768  # maps of the last two stages to 1,024, attention pooling to 768, norm, classifier
    maps = (width + 1) * 4 * inner + (width // 2 + 1) * inner
    pooling = 3 * 2 * inner + 3 * (inner * inner + inner) + (inner + 1) * out
    return maps + pooling + 2 * out + (out + 1) * 1000


def test_text_encoder_of_rils_has_the_published_number_of_parameters() -> None:
    config = parse(ModelConfig, ["text=rils"]).text
    with torch.device("meta"):
        text = TextTransformer(config, vocabulary_size=VOCABULARY, end_of_text_id=VOCABULARY - 1)
        to_shared_space = torch.nn.Linear(config.width, 512, bias=False)
    assert millions(text.blocks) == pytest.approx(37.8, abs=0.05)
    assert millions(text) + millions(to_shared_space) == pytest.approx(63.4, abs=0.05)


def test_text_encoder_of_m3i_has_the_shape_of_bert_base() -> None:
    config = parse(ModelConfig, ["text=m3i"]).text
    with torch.device("meta"):
        text = TextTransformer(config, vocabulary_size=VOCABULARY, end_of_text_id=VOCABULARY - 1)
    assert millions(text.blocks) == pytest.approx(85.1, abs=0.1)  # Devlin et al. 2019: 110 M with 23.8 M of words


@pytest.mark.parametrize("size", ["g", "G", "internimage-H"])
def test_a_billion_parameters_compute_a_feature_without_memory(size: str) -> None:
    network = on_meta(size=size, patch_size=16 if size.startswith("i") else 14)
    tokens = network(torch.empty(2, 3, 224, 224, device="meta"))
    assert network.patches(tokens).shape == (2, network.grid**2, network.width)
    assert network.pool(tokens).shape == (2, network.pooled_width)


@pytest.mark.parametrize("pooling", ["mean", "max", "map"])
def test_internimage_gives_tokens_and_one_feature_and_uses_all_it_has(pooling: str) -> None:
    network = encoder(size="internimage-nano", image_size=64, pooling=pooling)
    tokens = network(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, 4, network.width)
    feature = network.pool(tokens)
    feature.square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    with pytest.raises(ValueError, match="whole pictures only"):
        network(torch.randn(2, 3, 64, 64), torch.tensor([[0], [1]]))


def test_every_order_of_norms_of_internimage_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"channels": 16, "depths": (1, 1, 2, 1), "groups": 2}
    orders = {"order": "both", "offset_kernel": 5, "blend_centre": True, "extra_norms": (0,)}, {"order": "post"}
    for changes in orders:
        shape = type(INTERNIMAGE_SIZES["internimage-T"])(**small, **changes)
        monkeypatch.setitem(INTERNIMAGE_SIZES, "internimage-nano", shape)
        network = encoder(size="internimage-nano", image_size=64)
        network.pool(network(torch.randn(2, 3, 64, 64))).square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_activation_checkpointing_does_not_change_internimages_gradient() -> None:
    pixels, gradients = torch.randn(2, 3, 64, 64), []
    for enabled in (False, True):
        network = encoder(size="internimage-nano", image_size=64)
        for module in network.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = enabled
        network.pool(network(pixels)).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def naive_deformable_sum(x: Tensor, offset: Tensor, modulation: Tensor, scale: float) -> Tensor:
    """Equation 2 of the InternImage paper, a loop per symbol; bilinear interpolation written out; zero outside."""
    batch, height, width, channels = x.shape
    groups, points = modulation.shape[3:]
    share = channels // groups
    result = torch.zeros_like(x)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                for g in range(groups):
                    own = slice(g * share, (g + 1) * share)
                    for k in range(points):
                        across, down = divmod(k, 3)  # the operator's order: column by column
                        x_k = column + scale * (across - 1 + offset[b, row, column, g, k, 0])
                        y_k = row + scale * (down - 1 + offset[b, row, column, g, k, 1])
                        value = torch.zeros(share, dtype=x.dtype)
                        for r in (math.floor(y_k), math.floor(y_k) + 1):
                            for c in (math.floor(x_k), math.floor(x_k) + 1):
                                if 0 <= r < height and 0 <= c < width:
                                    value += (1 - abs(y_k - r)) * (1 - abs(x_k - c)) * x[b, r, c, own]
                        result[b, row, column, own] += modulation[b, row, column, g, k] * value
    return result


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    offset = torch.randn(2, 4, 5, 2, 9, 2, generator=generator, dtype=torch.float64) * 1.5
    modulation = torch.randn(2, 4, 5, 2, 9, generator=generator, dtype=torch.float64).softmax(-1)
    return x, offset, modulation


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dcnv3_is_the_papers_equation(inputs: tuple[Tensor, Tensor, Tensor], scale: float) -> None:
    torch.testing.assert_close(aggregate_plainly(*inputs, scale), naive_deformable_sum(*inputs, scale))


def test_dcnv3_without_offsets_and_with_even_modulation_is_a_mean_of_neighbours() -> None:
    convolution = DeformableConv(4, 2, offset_scale=1.0, offset_kernel=3, blend_centre=False)
    for linear in (convolution.enter, convolution.leave):
        torch.nn.init.eye_(linear.weight)
    x = torch.randn(1, 6, 6, 4)
    # As initialised: offsets 0, modulations equal, so each is 1/9 after the softmax.
    expected = functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(convolution(x), expected)


def test_dcnv3s_gradient_is_that_of_finite_differences(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, offset, modulation = (value[:1, :2, :3].clone().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(lambda *a: aggregate_plainly(*a, 1.0), (x, offset, modulation), atol=1e-4)


@pytest.fixture
def fake_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A module with the compiled operator's two functions and their arguments, which computes plainly."""
    calls: list[tuple[Any, ...]] = []

    def run(x: Tensor, offset: Tensor, modulation: Tensor, scale: float, groups: int) -> Tensor:
        shape = (*modulation.shape[:3], groups, 9)
        return aggregate_plainly(x, offset.view(*shape, 2), modulation.view(shape), scale)

    def forward(x: Tensor, offset: Tensor, modulation: Tensor, *rest: Any) -> Tensor:
        calls.append(rest)
        return run(x, offset, modulation, rest[10], rest[8])

    def backward(x: Tensor, offset: Tensor, modulation: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in (x, offset, modulation)]
        with torch.enable_grad():
            return torch.autograd.grad(run(*leaves, rest[10], rest[8]), leaves, rest[11])

    monkeypatch.setitem(sys.modules, "DCNv3", SimpleNamespace(dcnv3_forward=forward, dcnv3_backward=backward))
    dcnv3.operator.cache_clear()
    yield calls
    dcnv3.operator.cache_clear()


def test_the_compiled_operator_is_called_with_its_own_arguments(
    inputs: tuple[Tensor, Tensor, Tensor], fake_operator: list[tuple[Any, ...]]
) -> None:
    plain = [value.clone().requires_grad_() for value in inputs]
    through = [value.clone().requires_grad_() for value in inputs]
    aggregate_plainly(*plain, 2.0).square().sum().backward()
    result = dcnv3._Operator.apply(*through, 2.0)
    result.square().sum().backward()
    for one, other in zip(plain, through, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    # kernel, stride, padding, dilation, groups, channels of a group, offset scale, pictures at a time, keep the centre
    assert fake_operator[0] == (3, 3, 1, 1, 1, 1, 1, 1, 2, 3, 2.0, 2, 0)


def test_a_model_by_name_can_be_overridden_key_by_key() -> None:
    config = parse(ModelConfig, ["preset=ViT-L-14", "vision.image_size=28", "text=mae_clip", "text.depth=3"])
    assert (config.vision.size, config.vision.patch_size, config.vision.image_size) == ("L", 14, 28)
    assert (config.text.attention, config.text.depth, config.text.width) == ("bidirectional", 3, 512)
    assert parse(ModelConfig, ["vision=internimage-S"]).vision.kind == "internimage"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preset=ViT-B16"], "model=ViT-B16: no such preset; did you mean ViT-B-16"),
        (["text=bert"], "model.text=bert: no such preset"),
        (["vision=internimage-T", "vision.patch_size=8"], "patch_size=8: internimage-T has no use for this key"),
        (["vision=internimage-T", "vision.pooling=class"], "has no class token"),
        (["vision=internimage-T", "vision.image_size=100"], "no multiple of 32"),
        (["vision.pooling=median"], "vision.pooling=median"),
        (["vision=XXL"], "vision.size=XXL"),
    ],
)
def test_models_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse(ModelConfig, words)
