"""M3I: every form trains, predictions look at what they may, and terms are those of eq. 4."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import RequestError
from training.accumulation import accumulate
from training.data.tokenizer import Tokenizer
from training.losses.distributed import gather
from training.losses.feature_prediction import plain_norm
from training.losses.pixels import normalised_patches, patchify
from training.methods import Batch, ModelConfig
from training.methods.m3i import M3i
from training.methods.m3i_forms import FORMS, M3iConfig

CAPTIONS = ["a red cat", "two dogs", "", "a moon", "the sea", "x"]
LABELS = torch.tensor([0, 1, 2, -1, -1, 0])
CLASSES = ("animal", "plant", "thing")
PREDICTOR = {"width": 16, "depth": 1, "heads": 2}
# Float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small spend their time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(**vision: Any) -> ModelConfig:
    sizes = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 4}
    text = {"width": 16, "depth": 1, "heads": 2, "context_length": 16}
    if vision.keys() & {"size", "timm"}:
        sizes = {}
    return ModelConfig.model_validate({"vision": sizes | vision, "text": text, "embed_dim": 8})


def build(classes: tuple[str, ...] = CLASSES, vision: dict[str, Any] | None = None, **keys: Any) -> M3i:
    torch.manual_seed(0)
    tokenizer = Tokenizer.build(CAPTIONS, context_length=16, vocabulary="compact")
    config = M3iConfig.model_validate({"predictor": PREDICTOR} | keys)
    M3i.check(config, model(**(vision or {})), part_size=len(CAPTIONS), has_labels=bool(classes))
    return M3i.build(config, model(**(vision or {})), tokenizer, classes)


def batch(rows: slice = slice(None), **changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (6, 5, 5, 3), generator=generator).to(torch.uint8)
    fields: dict[str, Any] = {
        "images": coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[rows],
        "captions": CAPTIONS[rows],
        "sample_ids": (torch.arange(6) * 31)[rows],
        "epoch": torch.zeros(6, dtype=torch.int64)[rows],
        "labels": LABELS[rows],
        "step": 0,
        "seed": 0,
    }
    return Batch(**fields | changes)


def train(method: M3i, num_steps: int = 12) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(num_steps):
        method.before_step(step, num_steps)
        output = method(batch(step=step))
        optimizer.zero_grad()
        output.loss.backward()
        assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
        method.after_gradients()
        optimizer.step()
        losses.append({name: float(value) for name, value in output.losses.items()})
    return losses


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_table_2_trains_all_that_it_builds(form: str) -> None:
    method = build(form=form)
    losses = train(method)
    assert list(losses[0]) == ["intra" if FORMS[form].same_view else "inter"]  # type: ignore[index]
    assert sum(losses[-1].values()) < 0.95 * sum(losses[0].values())
    assert (method.target is None) == (FORMS[form].target == "pixels")  # type: ignore[index]


def test_the_forms_are_the_twelve_of_table_2() -> None:
    kinds = {(form.masked, form.same_view, form.target) for form in FORMS.values()}
    assert len(kinds) == len(FORMS) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("keys", "terms"),
    [
        ({}, ["intra", "inter", "category", "text"]),
        ({"category": False}, ["intra", "inter", "text"]),
        ({"form": "m3i_without_mix"}, ["inter", "category", "text"]),
        ({"form": "none"}, ["category", "text"]),
        ({"form": "none", "text": False}, ["category"]),
        ({"form": "mim_pixel", "category": True}, ["intra", "category"]),
        ({"balance": True, "negative_weight": 0.0}, ["intra", "inter", "category", "text"]),
        ({"mix_patch": 8, "mask": "random"}, ["intra", "inter", "category", "text"]),
        ({"mix_group": 3, "vision": {"pooling": "class"}}, ["intra", "inter", "category", "text"]),
        ({"vision": {"size": "internimage-nano", "image_size": 64}},
         ["intra", "inter", "category", "text"]),
    ],
)  # fmt: skip
def test_targets_come_and_go_with_their_modules(keys: dict[str, Any], terms: list[str]) -> None:
    losses = train(build(**keys), num_steps=8)
    assert list(losses[0]) == terms
    assert sum(losses[-1].values()) < sum(losses[0].values())


def test_without_categories_in_the_data_none_are_predicted() -> None:
    assert list(build(classes=())(batch(labels=None)).losses) == ["intra", "inter", "text"]


@pytest.mark.parametrize(
    "keys",
    [{}, {"form": "mim_global"}, {"form": "none"}, {"mix_patch": 8}, {"form": "siamese_feature", "mix_patch": 8}],
)
def test_counts_that_are_known_beforehand_are_those_of_the_losses(keys: dict[str, Any]) -> None:
    method, of = build(**keys), batch()
    own = method.embed(of)
    everyone = {name: gather(x) for name, x in (own.shared | own.constant).items()}
    losses = method.losses(of, own, everyone).losses
    counts = method.counts(of, own, everyone)
    assert {name: loss.count.item() for name, loss in losses.items()} == {n: c.item() for n, c in counts.items()}
    once = method(of).losses
    for name, loss in losses.items():
        torch.testing.assert_close(loss.sum / loss.count, once[name], **CLOSE)


def test_a_mixed_input_shows_both_pictures_and_each_is_read_where_it_shows() -> None:
    method, of = build(), batch()
    views = method.views(of)
    first, second = views.readings
    assert views.hidden is not None
    assert first.index is not None
    assert second.index is not None
    assert second.picture is not None
    assert torch.equal(second.picture, torch.tensor([1, 0, 3, 2, 5, 4]))
    both = torch.cat([first.index, second.index], dim=1).sort(1).values
    assert torch.equal(both, torch.arange(16).expand(6, -1))
    of_input, of_first = patchify(views.input, 4), patchify(views.target, 4)
    of_second = patchify(views.other[second.picture], 4)
    for row in range(6):
        assert torch.equal(of_input[row, first.index[row]], of_first[row, first.index[row]])
        assert torch.equal(of_input[row, second.index[row]], of_second[row, second.index[row]])
    # In its own view only what is hidden is asked for; of another view everything.
    assert torch.equal(first.counted, views.hidden.flatten(1))
    assert second.counted.all()


@pytest.mark.parametrize("patch", [None, 8])
def test_masked_forms_do_not_see_hidden_cells(patch: int | None) -> None:
    method, of = build(form="mim_pixel", mix_patch=patch), batch()
    views = method.views(of)
    assert views.hidden is not None
    cell = 16 // views.hidden.shape[-1]
    hidden = views.hidden.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]
    noise = torch.randn(views.input.shape, generator=torch.Generator().manual_seed(1))
    if patch is None:  # the encoder leaves the patches out, whatever they hold
        disturbed = replace(views, input=torch.where(hidden, noise, views.input))
        assert method.encode(views).shape[1] == 6  # 10 of 16 are hidden
        assert torch.equal(method.encode(disturbed), method.encode(views))
    else:
        assert views.input[hidden.expand_as(views.input)].eq(0).all()


def test_a_picture_is_predicted_from_the_features_that_show_it() -> None:
    method, of = build(), batch()
    views = method.views(of)
    tokens = method.encode(views).detach()
    first, second = views.readings
    assert second.index is not None
    disturbed = tokens.scatter(1, second.index[..., None].expand(-1, -1, 16), 7.0)
    assert torch.equal(method.predict(disturbed, views, first), method.predict(tokens, views, first))
    assert not torch.equal(method.predict(disturbed, views, second), method.predict(tokens, views, second))


def test_targets_are_those_of_the_paper() -> None:
    of = batch()
    dense, whole, pixels = (build(form=f) for f in ("siamese_feature", "instance_discrimination", "siamese_pixel"))
    views = dense.views(of)
    assert dense.target is not None
    features = dense.target(views.target)
    torch.testing.assert_close(dense.targets(views), plain_norm(features))
    torch.testing.assert_close(whole.targets(whole.views(of)), plain_norm(features.mean(1, keepdim=True)), **CLOSE)
    torch.testing.assert_close(pixels.targets(pixels.views(of)), normalised_patches(patchify(views.target, 4)))
    assert torch.equal(views.target, dense.views(replace(of, step=5)).target)
    assert not torch.equal(views.target, views.other)


def test_text_loss_is_info_nce_of_each_reading_over_captioned_pictures() -> None:
    """Naive: for every picture with a caption, against every caption and every picture with one."""
    method, of = build(), batch()
    with torch.no_grad():
        shared = method.embed(of).shared
    captioned = [row for row, caption in enumerate(CAPTIONS) if caption]
    sigma = 1 / 0.07  # the initial temperature
    total = 0.0
    for name in ("image_intra", "image_inter"):
        for row in captioned:
            logits = [float(sigma * shared[name][row] @ shared["text"][other]) for other in captioned]
            back = [float(sigma * shared[name][other] @ shared["text"][row]) for other in captioned]
            target = float(sigma * shared[name][row] @ shared["text"][row])
            for found in (logits, back):
                total += (float(torch.tensor(found).logsumexp(0)) - target) / 2
    assert method(of).losses["text"].item() == pytest.approx(total / (2 * len(captioned)), rel=1e-4)
    assert method.weights(0)["text"] == 2.0  # a sum over the two pictures of an input, of means


def test_categories_are_of_both_pictures_of_an_input() -> None:
    method, of = build(), batch()
    views = method.views(of)
    tokens = method.encode(views).detach()
    assert method.category is not None
    assert method.readout is not None
    total, count = 0.0, 0
    for reading in views.readings:
        logits = method.category(method.readout(reading.pick(tokens))).detach()
        for row in range(6):
            picture = row if reading.picture is None else int(reading.picture[row])
            if LABELS[picture] >= 0:
                total -= float(logits[row].log_softmax(0)[LABELS[picture]])
                count += 1
    assert count == 8
    assert method(of).losses["category"].item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("labels", [LABELS, torch.full((6,), -1)])
def test_a_batch_without_labels_or_captions_still_takes_every_branch(labels: Tensor) -> None:
    method = build()
    output = method(batch(labels=labels, captions=[""] * 6))
    output.loss.backward()
    assert output.losses["text"].item() == 0
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_gradient_norms_for_the_balance_are_those_of_the_whole_batch() -> None:
    whole, in_parts = build(balance=True), build(balance=True)
    whole(batch()).loss.backward()

    def backward(loss: Tensor, *, last: bool) -> None:
        loss.backward()

    accumulate(in_parts, batch(), 3, in_parts, backward)
    for method in (whole, in_parts):
        method.after_gradients()
    assert whole.balance is not None
    assert in_parts.balance is not None
    assert (whole.balance.norms > 0).all()
    torch.testing.assert_close(in_parts.balance.norms, whole.balance.norms, **CLOSE)
    assert in_parts.weights(1) == pytest.approx(whole.weights(1), rel=1e-4)


def test_the_momentum_encoder_is_a_copy_that_follows() -> None:
    method = build(form="siamese_feature")
    assert method.target is not None
    online, target = method.towers.image.stem.projection.weight, method.target.stem.projection.weight  # type: ignore[union-attr]
    assert torch.equal(online, target)
    with torch.no_grad():
        online += 1.0
    before = target.clone()
    method.before_step(5, 10)  # half of the cosine: 1 - 0.005 / 2
    torch.testing.assert_close(target, before.lerp(online, 0.0025))
    method.before_step(0, 10)
    assert torch.equal(target, online)  # a run starts with equal encoders, wherever their weights come from
    assert not target.requires_grad


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": (), "category": True}, "m3i.category=true: .* data.label_column"),
        ({"form": "none", "text": False, "category": False}, "m3i.form=none: nothing is left"),
        ({"mix_patch": 6}, "m3i.mix_patch=6: does not divide model.vision.image_size=16"),
        ({"mix_patch": 16}, "m3i.mix_patch=16"),
        ({"vision": {"size": "internimage-nano", "image_size": 32}}, "m3i.mix_patch=32"),
        ({"mix_group": 4}, "m3i.mix_group=4: does not divide the 6 samples"),
        ({"vision": {"pooling": "map"}}, "model.vision.pooling=map"),
        ({"vision": {"timm": "resnet18"}}, "model.vision.timm=resnet18: m3i reads patches"),
    ],
)
def test_a_request_that_cannot_work_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(**keys)


def test_features_of_pictures_and_captions_meet_where_there_is_a_text_target() -> None:
    of = batch()
    with_text, alone = build(), build(form="siamese_feature")
    assert with_text.encode_image(of.images).shape == with_text.encode_text(CAPTIONS).shape == (6, 8)
    assert alone.encode_image(of.images).shape == (6, 16)
    with pytest.raises(RequestError, match="method=m3i trains no text"):
        alone.encode_text(CAPTIONS)


def test_what_is_shown_is_the_mix_and_its_mask() -> None:
    shown = build(mix_group=3).show(batch())
    assert shown is not None
    assert list(shown.pictures) == ["target view", "other view", "second picture", "mask", "input"]
    pictures = shown.pictures
    white = pictures["mask"] == 255
    assert torch.equal(torch.where(white, pictures["target view"], pictures["second picture"]), pictures["input"])
    assert shown.captions["category"] == ["animal", "plant", "thing", "", "", "animal"]


def test_predicted_pixels_are_shown() -> None:
    method = build(form="auto_encoder", predictor=PREDICTOR | {"width": 64})
    before = method.show(batch())
    train(method, num_steps=120)
    after = method.show(batch())
    assert before is not None
    assert after is not None
    assert list(after.pictures) == ["target view", "prediction"]

    def error(pictures: dict[str, Tensor]) -> float:
        return (pictures["prediction"].float() - pictures["target view"].float()).abs().mean().item()

    assert error(after.pictures) < 0.6 * error(before.pictures)
    assert list(build(form="siamese_pixel").show(batch()).pictures) == [  # type: ignore[union-attr]
        "target view", "other view", "mask", "input", "prediction"
    ]  # fmt: skip
