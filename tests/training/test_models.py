"""Encoders see what they are given and nothing else."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from training.data.tokenizer import Tokenizer
from training.methods import METHODS, Method, ModelConfig, build_method
from training.models.blocks import Blocks, attend, take_tokens
from training.models.config import SIZES, Shape, TextConfig, VisionConfig
from training.models.decoder import PatchDecoder
from training.models.pooling import Pooling
from training.models.positions import sincos_2d
from training.models.text import TextTransformer
from training.models.vit import VisionTransformer, hide_patches

CAPTIONS = ["a red cat", "", "two dogs"]
# Two float32 evaluations of the same sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def vision(**keys: object) -> VisionConfig:
    return VisionConfig.model_validate(
        {"size": "nano", "width": 16, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 4, **keys}
    )


def vit(**keys: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(vision(**keys))


def text(**keys: object) -> TextTransformer:
    torch.manual_seed(0)
    config = TextConfig.model_validate({"width": 16, "depth": 2, "heads": 2, "context_length": 8, **keys})
    return TextTransformer(config, vocabulary_size=10, end_of_text_id=3)


def method(name: str) -> Method:
    model = ModelConfig.model_validate(
        {
            "vision": vision().model_dump(),
            "text": {"width": 16, "depth": 1, "heads": 2, "context_length": 8},
            "embed_dim": 8,
        }
    )
    torch.manual_seed(0)
    tokenizer = Tokenizer.build(CAPTIONS, context_length=8, vocabulary="compact")
    return build_method(name, METHODS[name].config_type(), model, tokenizer)


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [("Ti", 16, 5.5), ("S", 16, 21.7), ("B", 16, 85.8), ("L", 14, 303.3), ("g", 14, 1011), ("G", 14, 1843)],
)
def test_named_sizes_have_the_published_number_of_parameters(size: str, patch: int, millions: float) -> None:
    with torch.device("meta"):
        shape = SIZES[size]
        blocks = Blocks(shape)
    count = sum(p.numel() for p in blocks.parameters()) + shape.width * (3 * patch * patch + 1) + 2 * shape.width
    # Without position embeddings, class token and head, which published counts include differently.
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_positions_are_distinct_and_rows_differ_from_columns() -> None:
    positions = sincos_2d(4, 16)
    assert positions.shape == (16, 16)
    assert len(torch.unique(positions.round(decimals=4), dim=0)) == 16
    # Patches 1 (row 0, column 1) and 4 (row 1, column 0) swap halves.
    torch.testing.assert_close(positions[1, 8:], positions[4, :8])
    torch.testing.assert_close(
        positions[5, :8],
        torch.tensor([1, 0.1, 0.01, 0.001, 0, 0, 0, 0]).sin()
        + torch.tensor([0, 0, 0, 0, *torch.tensor([1, 0.1, 0.01, 0.001]).cos()]),
    )


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_written_out_attention_equals_torchs_own(causal: bool, masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    keys = torch.tensor([[True, True, False, True, False], [True] * 5]) if masked else None
    mask = None if keys is None else keys[:, None, None, :]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, causal=causal, keys_BL=keys), expected)


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("pooling", ["mean", "class", "max", "map"])
def test_every_stem_and_pooling_gives_one_feature_a_picture(stem: str, pooling: str) -> None:
    encoder = vit(stem=stem, pooling=pooling)
    tokens = encoder(torch.randn(2, 3, 16, 16))
    assert encoder.patches(tokens).shape == (2, 16, 16)
    feature = encoder.pool(tokens)
    assert feature.shape == (2, 16)
    feature.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_hidden_patches_have_no_influence_on_the_visible_ones(stem: str) -> None:
    encoder, pixels = vit(stem=stem), torch.randn(2, 3, 16, 16)
    keep = torch.tensor([[0, 5, 15], [2, 3, 7]])
    changed = torch.randn(2, 3, 16, 16)
    visible = hide_patches(torch.ones_like(pixels), keep, grid=4).bool()
    other = torch.where(visible, pixels, changed)
    torch.testing.assert_close(encoder(pixels, keep), encoder(other, keep), **CLOSE)
    assert not torch.allclose(encoder(pixels, keep), encoder(pixels)[:, :3], **CLOSE)


def test_keeping_every_patch_is_the_whole_picture() -> None:
    encoder, pixels = vit(stem="conv"), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(pixels, torch.arange(16).expand(2, 16)), encoder(pixels), **CLOSE)


def test_kept_patches_carry_their_own_pixels_and_positions() -> None:
    encoder, pixels = vit(depth=1), torch.randn(1, 3, 16, 16)
    one = encoder(pixels, torch.tensor([[6]]))
    # Patch 6 of a 4 x 4 grid is row 1, column 2; alone it attends to itself only.
    cell = encoder.stem.projection(pixels[:, :, 4:8, 8:12]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(one, encoder.norm(encoder.blocks(cell + encoder.positions[6])), **CLOSE)


@pytest.mark.parametrize("pooling", ["mean", "max", "map", "end"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_nothing_after_the_end_of_a_text_has_influence(attention: str, pooling: str) -> None:
    encoder = text(attention=attention, pooling=pooling)
    ids = torch.tensor([[2, 5, 6, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]])
    noise = torch.tensor([[2, 5, 6, 3, 9, 8, 7, 4], [2, 3, 9, 9, 4, 4, 4, 4]])
    torch.testing.assert_close(encoder(ids), encoder(noise), **CLOSE)
    torch.testing.assert_close(encoder(ids), encoder(ids[:, :4]), **CLOSE)
    assert not torch.allclose(encoder(ids)[0], encoder(torch.tensor([[2, 6, 5, 3]]))[0], **CLOSE)


def test_a_causal_token_does_not_see_what_follows_and_a_bidirectional_one_does() -> None:
    blocks = Blocks(Shape(width=16, depth=2, heads=2, mlp_width=64))
    x = torch.randn(1, 4, 16)
    later = torch.cat([x[:, :3], torch.randn(1, 1, 16)], dim=1)
    torch.testing.assert_close(blocks(x, causal=True)[:, :3], blocks(later, causal=True)[:, :3], **CLOSE)
    assert not torch.allclose(blocks(x)[:, :3], blocks(later)[:, :3], **CLOSE)


def test_pooling_is_what_its_name_says() -> None:
    x, keys = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(Pooling("mean", 4, 1)(x, keys)[0], x[0, :2].mean(0))
    torch.testing.assert_close(Pooling("max", 4, 1)(x, keys)[0], x[0, :2].amax(0))
    assert torch.equal(Pooling("class", 4, 1)(x), x[:, 0])
    assert torch.equal(Pooling("end", 4, 1)(x, keys, torch.tensor([1, 2])), torch.stack([x[0, 1], x[1, 2]]))
    one_token = Pooling("map", 4, 1)
    torch.testing.assert_close(one_token(x[:, :1]), one_token.out(one_token.key_value(x[:, 0])[:, 4:]))


def test_the_decoder_puts_visible_patches_back_in_their_places() -> None:
    torch.manual_seed(0)
    decoder = PatchDecoder(16, Shape(width=16, depth=1, heads=2, mlp_width=64), grid=4, out_width=16)
    visible, keep = torch.randn(1, 3, 16), torch.tensor([[1, 4, 10]])
    seen: list[Tensor] = []
    decoder.blocks.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert decoder(visible, keep).shape == (1, 16, 16)
    placed = seen[0] - decoder.positions
    torch.testing.assert_close(take_tokens(placed, keep), decoder.enter(visible), **CLOSE)
    hidden = torch.tensor([[k for k in range(16) if k not in (1, 4, 10)]])
    torch.testing.assert_close(take_tokens(placed, hidden), decoder.mask_token.expand(1, 13, 16), **CLOSE)


def test_captions_are_cut_after_the_longest_without_changing_features() -> None:
    built = method("clip")
    alone = built.encode_text(["a red cat"])
    torch.testing.assert_close(built.encode_text(["a red cat", "two dogs two dogs two dogs"])[:1], alone, **CLOSE)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_size": 30, "patch_size": 16}, "no multiple of patch_size=16"),
        ({"stem": "conv", "patch_size": 14, "image_size": 28}, "power of two"),
        ({"width": 20, "heads": 3}, "multiple of 4 and of heads=3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        vision(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"timm": "resnet18", "pooling": "max"}, "pooling=max: resnet18 has no use for this key"),
        ({"size": "internimage-nano", "norm_eps": 1e-6}, "norm_eps=1e-06: internimage-nano has no use for this key"),
    ],
)
def test_keys_that_another_kind_of_encoder_would_not_heed_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VisionConfig(**keys)
