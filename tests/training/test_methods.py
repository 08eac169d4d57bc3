"""Each method trains what it builds, counts what it sums, and looks at nothing that it should not see."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import RequestError
from training.data.tokenizer import Tokenizer
from training.losses.distributed import gather
from training.methods import METHODS, Batch, Method, ModelConfig, build_method
from training.methods.views import read_captions
from training.models.blocks import take_tokens
from training.models.vit import hide_patches

CAPTIONS = ["a red cat", "", "two dogs and a house in the sun", "a moon"]
DECODER = {"width": 16, "depth": 1, "heads": 2}
# Two float32 evaluations of the same sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {}),
    "slip": ("slip", {"ssl_hidden": 32, "ssl_dim": 8}),
    "mae": ("mae", {"decoder": DECODER}),
    "mae of raw pixels": ("mae", {"decoder": DECODER, "norm_pixels": False}),
    "mae of features": ("mae", {"decoder": DECODER, "target": "features"}),
    "m3ae": ("m3ae", {"decoder": DECODER}),
    "m3ae with two encoders": ("m3ae", {"decoder": DECODER, "encoder": "separate"}),
    "mae_clip": ("mae_clip", {"decoder": DECODER}),
    "mae_clip at random": ("mae_clip", {"decoder": DECODER, "masking": "random"}),
    "mae_clip low": ("mae_clip", {"decoder": DECODER, "similarity": "low"}),
    "rils": ("rils", {}),
    "rils in pixels": ("rils", {"target": "pixels"}),
    "rils on prototypes": ("rils", {"target": "prototypes", "num_prototypes": 12}),
    "rils without set C": ("rils", {"use_set_c": False, "decoder_depth": 2, "mask_ratio": 0.6}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small spend their time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(**keys: Any) -> ModelConfig:
    vision = {"size": "nano", "width": 16, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 4}
    text = {"width": 24, "depth": 1, "heads": 2, "context_length": 16}
    return ModelConfig.model_validate(
        {"vision": vision | keys.get("vision", {}), "text": text | keys.get("text", {}), "embed_dim": 8}
    )


def build(variant: str, **keys: Any) -> Any:
    name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    tokenizer = Tokenizer.build(CAPTIONS, context_length=16, vocabulary="compact")
    return build_method(name, METHODS[name].config_type.model_validate(settings), model(**keys), tokenizer)


def batch(captions: list[str] = CAPTIONS, **changes: Any) -> Batch:
    size = len(captions)
    images = torch.randint(0, 256, (size, 20, 20, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    fields: dict[str, Any] = {
        "images": images,
        "captions": captions,
        "sample_ids": torch.arange(size) * 31,
        "epoch": torch.zeros(size, dtype=torch.int64),
        "step": 0,
        "seed": 0,
    }
    return Batch(**fields | changes)


def everything(method: Method, of: Batch) -> Any:
    """What `losses` returns for a batch that is the whole world."""
    own = method.embed(of).detached()
    return method.losses(of, own, {name: gather(x) for name, x in own.shared.items()}), own


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_uses_every_module_that_it_builds(variant: str) -> None:
    built = build(variant)
    output = built(batch())
    output.loss.backward()
    unused = [key for key, parameter in built.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert unused == []
    assert output.loss.dtype == torch.float32
    assert not any(value.requires_grad for value in [*output.losses.values(), *output.metrics.values()])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_steps_on_one_batch_lower_every_loss_under_autocast(variant: str) -> None:
    built = build(variant)
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=3e-3)
    totals: list[float] = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            output = built(batch())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        totals.append(output.loss.item())
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_that_are_known_beforehand_are_those_of_the_losses(variant: str) -> None:
    built = build(variant)
    sums, own = everything(built, batch())
    everyone = {name: gather(x) for name, x in own.shared.items()}
    own.kept.clear()
    counts = built.counts(batch(), own, everyone)
    assert {name: int(count) for name, count in counts.items()} == {
        name: int(loss.count) for name, loss in sums.losses.items()
    }
    assert built.weights(0).keys() == counts.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_in_bfloat16_weights_runs(variant: str) -> None:
    built = build(variant).to(torch.bfloat16)
    output = built(batch())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_float32_and_of_length_one_also_under_autocast(variant: str) -> None:
    built = build(variant).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = [built.encode_image(batch().images)]
        if not variant.startswith(("mae", "m3ae")) or variant.startswith("mae_clip"):
            features.append(built.encode_text(CAPTIONS))
    for feature in features:
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("variant", ["mae", "m3ae", "m3ae with two encoders"])
def test_a_method_without_a_shared_space_says_so_when_asked_for_text_features(variant: str) -> None:
    with pytest.raises(RequestError, match=f"method={VARIANTS[variant][0]} trains no"):
        build(variant).encode_text(CAPTIONS)


@pytest.mark.parametrize("variant", ["mae", "mae of features", "m3ae", "m3ae with two encoders"])
def test_the_loss_of_samples_that_never_meet_is_the_sum_of_their_own(variant: str) -> None:
    built = build(variant)
    whole, _ = everything(built, batch())
    parts = [everything(built, part)[0] for part in batch().split(4)]
    for name, loss in whole.losses.items():
        assert int(loss.count) == sum(int(part.losses[name].count) for part in parts)
        torch.testing.assert_close(loss.sum, torch.stack([p.losses[name].sum for p in parts]).sum(), **CLOSE)


@pytest.mark.parametrize("variant", ["mae", "m3ae", "m3ae with two encoders", "mae_clip at random", "rils in pixels"])
def test_predictions_come_from_visible_patches_alone(variant: str) -> None:
    built = build(variant, vision={"stem": "conv"})
    pixels, other = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def predicted(shown: Tensor) -> Tensor:
        if hasattr(built, "mask"):
            return built.predict(shown, built.mask(batch()))
        captions = read_captions(built.tokenizer, CAPTIONS, torch.device("cpu"))
        return built.predict(shown, captions, hidden())[0]

    def hidden() -> Any:
        if VARIANTS[variant][0] == "m3ae":
            return built.hide(batch())[1]
        return built.hide(batch(), None, read_captions(built.tokenizer, CAPTIONS, torch.device("cpu")))

    keep = built.mask(batch()).keep if hasattr(built, "mask") else hidden().patches.keep
    visible = hide_patches(torch.ones_like(pixels), keep, grid=4).bool()
    torch.testing.assert_close(predicted(torch.where(visible, pixels, other)), predicted(pixels), **CLOSE)
    assert not torch.allclose(predicted(other), predicted(pixels), **CLOSE)


@pytest.mark.parametrize("variant", ["m3ae", "m3ae with two encoders"])
def test_hidden_words_and_padding_have_no_influence_on_predictions(variant: str) -> None:
    built = build(variant)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    captions, hidden = built.hide(batch())
    away = hidden.words.hidden(captions.ids.shape[1]) | ~captions.keys
    noise = captions.ids.masked_fill(away, 7)
    assert not torch.equal(noise, captions.ids)
    changed = type(captions)(ids=noise, ends=captions.ends)
    patches, words = built.predict(pixels, captions, hidden)
    patches_then, words_then = built.predict(pixels, changed, hidden)
    torch.testing.assert_close(patches_then, patches, **CLOSE)
    torch.testing.assert_close(words_then, words, **CLOSE)
    swapped = type(captions)(ids=captions.ids.roll(1, dims=0), ends=captions.ends)
    assert not torch.allclose(built.predict(pixels, swapped, hidden)[1], words, **CLOSE)


def test_a_joint_encoder_lets_patches_see_words_and_two_encoders_do_not() -> None:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    words, seen = torch.randn(2, 1, 3, 16), torch.tensor([[True, True, False]])
    image = build("m3ae").towers.image
    together = [image(pixels, beside=(tokens, seen))[:, :16] for tokens in words]
    assert not torch.allclose(*together, **CLOSE)
    filler = torch.cat([words[0, :, :2], words[1, :, 2:]], dim=1)
    torch.testing.assert_close(image(pixels, beside=(filler, seen))[:, :16], together[0], **CLOSE)
    assert not hasattr(build("m3ae with two encoders"), "words")
    assert not hasattr(build("m3ae").towers, "text")


@pytest.mark.parametrize("hide", ["high", "low"])
def test_mae_clip_hides_what_is_most_or_least_similar_to_the_other_modality(hide: str) -> None:
    built = build("mae_clip" if hide == "high" else "mae_clip low")
    of = batch()
    own, captions = built.embed(of).detached(), read_captions(built.tokenizer, CAPTIONS, torch.device("cpu"))
    hidden = built.hide(of, own, captions)
    patch, word = built.similarities(own)
    towers = built.towers
    naive = torch.nn.functional.cosine_similarity(
        towers.image_projection(own.kept["image"][2, 5]), own.shared["text"][2], dim=0
    )
    assert patch[2, 5].item() == pytest.approx(naive.item(), abs=1e-5)
    sign = 1 if hide == "high" else -1
    assert (
        (sign * patch).gather(1, hidden.patches.masked).amin(1) >= (sign * patch).gather(1, hidden.patches.keep).amax(1)
    ).all()
    gone, kept = hidden.words.masked[2][hidden.words.counted[2]], hidden.words.keep[2][hidden.words.seen[2]][1:-1]
    assert len(gone) == 6
    assert len(kept) == 2
    assert (sign * word[2, gone]).min() >= (sign * word[2, kept]).max()


def test_mae_and_m3ae_name_their_image_encoder_as_clip_does() -> None:
    expected = {key for key in build("clip").state_dict() if key.startswith("towers.image.")}
    for variant in ("mae", "m3ae", "m3ae with two encoders", "mae_clip", "slip", "rils"):
        assert {key for key in build(variant).state_dict() if key.startswith("towers.image.")} == expected
    for variant in ("m3ae with two encoders", "mae_clip"):
        text = {key for key in build("clip").state_dict() if key.startswith("towers.text.")}
        assert {key for key in build(variant).state_dict() if key.startswith("towers.text.")} == text


def test_a_teacher_is_not_trained_and_its_features_are_the_target() -> None:
    built = build("mae of features")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert not any(parameter.requires_grad for parameter in built.teacher.parameters())
    target = built.targets(pixels)
    assert not target.requires_grad
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    whole = built.teacher(pixels)
    torch.testing.assert_close(target[0, 3], torch.nn.functional.layer_norm(whole[0, 3], (16,)), **CLOSE)


def test_rils_in_pixels_is_clip_plus_the_error_of_decoded_patches() -> None:
    built = build("rils in pixels")
    sums, own = everything(built, batch())
    mask = built.mask(batch())
    decoded = built.predict(own.kept["pixels"], mask)
    total = 0.0
    for row in range(4):
        for place, patch in zip(mask.masked[row].tolist(), decoded[row], strict=True):
            y, x = 4 * (place // 4), 4 * (place % 4)
            cell = own.kept["pixels"][row, :, y : y + 4, x : x + 4].permute(1, 2, 0).flatten()
            total += ((patch - (cell - cell.mean()) / (cell.var() + 1e-6).sqrt()) ** 2).mean().item()
    assert sums.losses["reconstruction"].sum.item() == pytest.approx(total, rel=1e-4)
    assert int(sums.losses["reconstruction"].count) == 4 * 12  # all pictures, matched or not


def test_rils_on_prototypes_reconstructs_over_them_and_not_over_texts() -> None:
    built = build("rils on prototypes")
    built.rils.__dict__["use_set_c"] = False
    sums, own = everything(built, batch())
    mask, theta = built.mask(batch()), built.towers.image_projection
    prototypes = torch.nn.functional.normalize(built.prototypes, dim=-1)
    whole = torch.nn.functional.normalize(theta(take_tokens(own.kept["tokens"], mask.masked)), dim=-1)
    decoded = torch.nn.functional.normalize(theta(built.predict(own.kept["pixels"], mask)), dim=-1)
    p, q = (whole @ prototypes.T / 0.04).softmax(-1), (decoded @ prototypes.T / 0.1).softmax(-1)
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(sums.losses["reconstruction"].sum, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", ["m3ae", "m3ae with two encoders", "mae_clip"])
@pytest.mark.parametrize("captions", [["", ""], ["two dogs and a house in the sun " * 9, ""]])
def test_empty_and_endless_captions_are_trained_on(variant: str, captions: list[str]) -> None:
    built = build(variant)
    output = built(batch(captions))
    output.loss.backward()
    assert output.loss.isfinite()
    assert (output.losses["text"] == 0) == (captions[0] == "")
    assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("variant", ["clip", "slip", "rils", "m3ae", "mae_clip"])
def test_captions_that_lose_words_to_the_context_are_counted(variant: str) -> None:
    output = build(variant)(batch(["a red cat", "two dogs and a house in the sun " * 9, "", "a moon"]))
    assert output.metrics["captions_cut"].item() == 0.25


def test_pictures_smaller_than_the_crop_are_enlarged() -> None:
    small = batch(images=torch.randint(0, 256, (4, 7, 7, 3)).to(torch.uint8))
    for variant in ("mae", "slip"):
        assert build(variant)(small).loss.isfinite()


@pytest.mark.parametrize(
    ("variant", "keys", "message"),
    [
        ("mae", {"vision": {"pooling": "map"}}, "model.vision.pooling=map: the loss of method=mae"),
        ("m3ae", {"vision": {"pooling": "map"}}, "model.vision.pooling=map: the loss of method=m3ae"),
        ("m3ae with two encoders", {"text": {"pooling": "map"}}, "model.text.pooling=map"),
    ],
)
def test_a_pooling_that_nothing_would_train_is_refused(variant: str, keys: dict[str, Any], message: str) -> None:
    name, settings = VARIANTS[variant]
    method = METHODS[name]
    with pytest.raises(RequestError, match=message):
        method.check(method.config_type.model_validate(settings), model(**keys), part_size=4, has_labels=False)
    method.check(method.config_type.model_validate(settings), model(), part_size=4, has_labels=False)


@pytest.mark.parametrize("variant", ["mae", "m3ae", "m3ae with two encoders", "mae_clip", "rils in pixels"])
def test_what_is_shown_keeps_the_visible_patches_and_predicts_the_others(variant: str) -> None:
    built = build(variant)
    with torch.no_grad():
        shown = built.show(batch())
    picture, visible, guessed = (shown.pictures[name].int() for name in ("picture", "visible", "reconstruction"))
    assert picture.shape == (4, 16, 16, 3)
    changed = ((visible != picture).any(-1)).float().mean((1, 2))
    assert ((changed > 0.7) & (changed <= 0.75)).all()
    kept = (visible == picture).all(-1)
    assert (guessed == picture)[kept].all()
    assert all(len(column) == 4 for column in shown.captions.values())


def test_masked_captions_are_shown_with_their_hidden_words_left_out() -> None:
    shown = build("m3ae").show(batch())
    assert shown.captions["caption"][0] == "a red cat"
    assert shown.captions["visible words"][0].split() == ["_", "_", "_"]
    assert len(shown.captions["visible words"][2].split()) == 8
    assert shown.captions["visible words"][2].count("_") == 6
    assert shown.captions["visible words"][1] == ""


def test_the_contrast_is_local_until_the_given_step_and_global_from_it_on() -> None:
    config = METHODS["mae_clip"].config_type.model_validate({"decoder": DECODER, "local_steps": 500})
    tokenizer = Tokenizer.build(CAPTIONS, context_length=16, vocabulary="compact")
    built = build_method("mae_clip", config, model(), tokenizer)
    assert [built.scope(step) for step in (0, 499, 500, 501)] == ["local", "local", "global", "global"]


def test_generative_weights_can_step_where_the_contrast_becomes_global() -> None:
    weight = {"value": 0.1, "initial": 0.0, "start_step": 500}
    config = METHODS["mae_clip"].config_type.model_validate({"decoder": DECODER, "image_weight": weight})
    tokenizer = Tokenizer.build(CAPTIONS, context_length=16, vocabulary="compact")
    built = build_method("mae_clip", config, model(), tokenizer)
    assert [built.weights(step) for step in (499, 500)] == [
        {"contrastive": 1.0, "image": 0.0, "text": 0.05},
        {"contrastive": 1.0, "image": 0.1, "text": 0.05},
    ]
