"""MUG: the caption loss is the paper's, words see what they may, and without captions it is MAE."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.data.tokenizer import Tokenizer
from training.losses.distributed import LossSum
from training.losses.masked_text import masked_text, predicted_places
from training.methods import METHODS, Batch, ModelConfig, build_method
from training.methods.mug import Mug
from training.methods.views import read_captions
from training.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig

CAPTIONS = ["red", "green", "blue", "green and blue", "", "red and green"]
COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 255, 255], [0, 0, 0], [255, 255, 0]])
DECODER = {"width": 16, "depth": 1, "heads": 2}
SETTINGS: dict[str, Any] = {"decoder": DECODER, "caption_decoder": DECODER | {"depth": 2, "text_depth": 1}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small spend their time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer() -> Tokenizer:
    return Tokenizer.build(CAPTIONS, context_length=8, vocabulary="compact")


def build(name: str = "mug", **keys: Any) -> Any:
    torch.manual_seed(0)
    vision = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 4}
    settings = {k: v for k, v in SETTINGS.items() if name == "mug" or k == "decoder"}
    config = METHODS[name].config_type.model_validate(settings | keys)
    model = ModelConfig.model_validate({"vision": vision, "text": {"context_length": 8}})
    return build_method(name, config, model, tokenizer())


def batch(step: int = 0, rows: slice = slice(None)) -> Batch:
    """Pictures of one colour each, which their captions name."""
    images = COLOURS[:, None, None].expand(-1, 16, 16, -1).to(torch.uint8).contiguous()
    return Batch(
        images=images[rows],
        captions=CAPTIONS[rows],
        sample_ids=(torch.arange(6) * 31)[rows],
        epoch=torch.full((6,), step)[rows],
        step=step,
        seed=0,
    )


def train(method: Mug, num_steps: int) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    found = []
    for step in range(num_steps):
        output = method(batch(step))
        optimizer.zero_grad()
        output.loss.backward()
        assert [name for name, p in method.named_parameters() if p.grad is None] == []
        optimizer.step()
        found.append({name: float(value) for name, value in (output.losses | output.metrics).items()})
    return found


def caption_loss(logits: Tensor, ids: Tensor, ends: Tensor) -> LossSum:
    """As `Mug.caption` has it, of scores at all places."""
    wanted = predicted_places(ends, ids.shape[1])
    return masked_text(logits[wanted.roll(-1, 1)], ids[wanted])


def test_caption_loss_equals_the_hand_computed_case() -> None:
    # <start> a <end> -: two tokens are predicted, with probabilities 1/2 and 1/4; the second caption is empty.
    ids = torch.tensor([[1, 3, 2, 0], [1, 2, 0, 0]])
    logits = torch.zeros(2, 4, 4)
    logits[0, 0] = torch.tensor([0.0, 0.0, 0.0, math.log(3)])  # 3 of 6 for token 3
    loss = caption_loss(logits, ids, torch.tensor([2, 1]))
    assert loss.sum.item() == pytest.approx(math.log(2) + math.log(4))
    assert loss.count.item() == 2


def test_caption_loss_equals_a_loop_over_words() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, ends = torch.randint(3, 9, (4, 6), generator=generator), torch.tensor([5, 3, 1, 2])
    logits = torch.randn(4, 6, 9, generator=generator)
    terms = []
    for row in range(4):
        for place in range(1, int(ends[row]) + 1):
            if ends[row] > 1:
                p = logits[row, place - 1].exp() / logits[row, place - 1].exp().sum()
                terms.append(-math.log(p[ids[row, place]]))
    loss = caption_loss(logits, ids, ends)
    assert loss.count.item() == len(terms) == 10
    assert loss.sum.item() == pytest.approx(sum(terms), rel=1e-5)


@pytest.mark.parametrize("text_depth", [0, 1, 2])
def test_a_word_sees_what_precedes_it_and_the_picture(text_depth: int) -> None:
    torch.manual_seed(0)
    config = CaptionDecoderConfig(width=16, depth=3, text_depth=text_depth, heads=2)
    decoder = CaptionDecoder(config, picture_width=12, vocabulary_size=9, length=6, causal=True)
    ids, picture = torch.randint(0, 9, (2, 6)), torch.randn(2, 5, 12)
    everywhere = torch.ones_like(ids, dtype=torch.bool)

    def score(ids: Tensor, picture: Tensor) -> Tensor:
        return decoder(ids, picture, at_BL=everywhere).view(2, 6, 9)  # type: ignore[no-any-return]

    scores = score(ids, picture)
    later = score(torch.cat([ids[:, :4], (ids[:, 4:] + 1) % 9], dim=1), picture)
    torch.testing.assert_close(later[:, :4], scores[:, :4])
    assert not torch.allclose(later[:, 4:], scores[:, 4:])
    other = score(ids, picture.flip(0))
    assert (other - scores).abs().amax((0, 2)).min() > 1e-4  # at every place
    assert len(decoder.layers) == 3 - text_depth


def test_words_alone_do_not_see_the_picture() -> None:
    """The first `text_depth` layers give the same features whatever the picture."""
    torch.manual_seed(0)
    config = CaptionDecoderConfig(width=16, depth=2, text_depth=1, heads=2)
    decoder = CaptionDecoder(config, picture_width=12, vocabulary_size=9, length=6, causal=True)
    seen: list[Tensor] = []
    assert decoder.text_layers is not None
    decoder.text_layers.register_forward_hook(lambda module, inputs, output: seen.append(output))
    ids = torch.randint(0, 9, (2, 6))
    decoder(ids, torch.randn(2, 5, 12), at_BL=ids >= 0)
    decoder(ids, torch.randn(2, 5, 12), at_BL=ids >= 0)
    assert torch.equal(seen[0], seen[1])


def test_captions_come_from_the_pictures_and_are_written_word_for_word() -> None:
    method = build(caption_weight={"value": 1.0}, mask_ratio=0.5, monitor_every_steps=1)
    found = train(method, 60)
    assert found[-1]["reconstruction"] < 0.5 * found[0]["reconstruction"]
    assert found[-1]["caption"] < 0.3 * found[0]["caption"]
    # Another picture's features make the captions unlikely: the decoder looks at them.
    assert found[-1]["caption_of_other_picture"] > 5 * found[-1]["caption"]
    assert found[-1]["captions_cut"] == 0
    with torch.no_grad():
        shown = method.show(batch(60))
    named = [caption for caption in CAPTIONS if caption]
    written = [text for text, caption in zip(shown.captions["generated"], CAPTIONS, strict=True) if caption]
    assert sum(a == b for a, b in zip(written, named, strict=True)) >= 4
    assert list(shown.pictures) == ["picture", "visible", "reconstruction"]


def test_hidden_words_are_filled_in_from_the_others_and_the_picture() -> None:
    method = build(captioning="masked", caption_weight={"value": 1.0}, caption_mask_ratio=0.6)
    found = train(method, 40)
    assert found[-1]["caption"] < 0.5 * found[0]["caption"]
    shown = method.show(batch(40))
    blanked, filled = shown.captions["words hidden"], shown.captions["filled in"]
    for caption, blanks, whole in zip(CAPTIONS, blanked, filled, strict=True):
        words = caption.split()
        kept = [word for word in blanks.split() if word != "_"]
        assert len(blanks.split()) == len(words)
        assert blanks.count("_") == math.ceil(len(words) * 0.6 - 1e-6)
        assert all(word in words for word in kept)
        assert [a for a, b in zip(whole.split(), blanks.split(), strict=False) if b != "_"] == kept


def test_a_hidden_word_is_not_seen() -> None:
    method, of = build(captioning="masked", caption_mask_ratio=0.6), batch()
    captions = read_captions(method.tokenizer, of.captions, torch.device("cpu"))
    hidden = method._hidden(captions, of)
    visible = torch.randn(6, 4, 16)

    def scores(ids: Tensor) -> Tensor:
        return method._scores(visible, replace(captions, ids=ids), hidden)

    changed = torch.where(hidden, (captions.ids + 1) % method.tokenizer.vocabulary_size, captions.ids)
    assert not torch.equal(changed, captions.ids)
    assert torch.equal(scores(changed), scores(captions.ids))


@pytest.mark.parametrize("keys", [{}, {"captioning": "masked"}, {"caption_weight": {"value": 0.0}}])
def test_counts_that_are_known_beforehand_are_those_of_the_losses(keys: dict[str, Any]) -> None:
    method, of = build(**keys), batch()
    own = method.embed(of)
    losses, counts = method.losses(of, own, {}).losses, method.counts(of, own, {})
    assert {name: loss.count.item() for name, loss in losses.items()} == {n: c.item() for n, c in counts.items()}


@pytest.mark.parametrize("captioning", ["autoregressive", "masked"])
def test_the_loss_of_a_batch_is_that_of_its_parts(captioning: str) -> None:
    method = build(captioning=captioning)
    whole = method.losses(batch(), method.embed(batch()), {}).losses
    parts = [method.losses(batch(rows=rows), method.embed(batch()), {}).losses for rows in (slice(2), slice(2, 6))]
    for name, loss in whole.items():
        torch.testing.assert_close(loss.sum, sum(part[name].sum for part in parts), rtol=1e-5, atol=1e-5)
        assert loss.count == sum(part[name].count for part in parts)


def test_without_the_caption_it_is_mae() -> None:
    mug, mae = build(caption_weight={"value": 0.0}, norm_pixels=True), build("mae")
    assert mug.state_dict().keys() == mae.state_dict().keys()
    assert mug(batch()).losses == mae(batch()).losses
    assert Mug.needs_captions(mug.mug) == "none"
    later = build(caption_weight={"value": 0.1, "start_step": 100})
    assert later.caption_decoder is not None
    assert later.weights(99)["caption"] == 0
    assert later.weights(100) == {"reconstruction": 1.0, "caption": 0.1}
    falling = build(caption_weight={"value": 0.0, "initial": 0.1, "ramp_steps": 100})
    assert falling.weights(50) == {"reconstruction": 1.0, "caption": 0.05}


def test_a_single_picture_has_no_other_one_to_be_monitored_with() -> None:
    assert "caption_of_other_picture" in build(monitor_every_steps=1)(batch()).metrics
    assert "caption_of_other_picture" not in build(monitor_every_steps=1)(batch(rows=slice(1))).metrics


def test_a_batch_of_empty_captions_has_no_caption_loss() -> None:
    method = build()
    output = method(replace(batch(), captions=[""] * 6))
    output.loss.backward()
    assert output.losses["caption"].item() == 0
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_a_decoder_needs_a_layer_that_sees_the_picture() -> None:
    with pytest.raises(ValueError, match="text_depth=2: has to leave one of depth=2"):
        CaptionDecoderConfig(depth=2, text_depth=2)
