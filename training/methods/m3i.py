"""M3I (Su et al. 2023): one input that shows two pictures predicts both pictures, their categories and their captions.

L = sum over the target groups of -log P(z_y | z^_y) (eq. 4), with z_x = f_theta(input) the encoded input, z_y a target
of one of its pictures, and z^_y = f_psi(z_x) its prediction.

Legend: B batch, C colours, S side, N features of a view, D encoder width, K values predicted for a place, E width of
the space shared with text, P places, G pictures that meet.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from training import random
from training.data.tokenizer import Tokenizer
from training.losses.classification import classification
from training.losses.distributed import Gathered, LossSum, gather
from training.losses.feature_prediction import feature_prediction, outer_products
from training.losses.info_nce import info_nce
from training.losses.pixels import denormalised_patches, patchify, unpatchify
from training.losses.similarity import scale, unit
from training.methods.m3i_balance import Balance
from training.methods.m3i_forms import M3iConfig
from training.methods.m3i_networks import M3iNetworks
from training.methods.m3i_views import Views, look, show_views
from training.methods.values import Batch, Embedded, Output, Shown, Sums, combine, mean_of
from training.methods.views import captions_cut, to_pictures
from training.models.blocks import take_tokens
from training.models.config import ModelConfig
from training.models.towers import Towers


class M3i(M3iNetworks):
    """Multi-input, multi-target pre-training, and the single objectives that it is made of."""

    name: ClassVar[str] = "m3i"

    def __init__(
        self, config: M3iConfig, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str] = ()
    ) -> None:
        super().__init__(config, model, tokenizer, classes)
        self.balance = Balance(list(self._plain_weights(0))) if config.balance else None

    def after_gradients(self) -> None:
        """Collective: take in how long the terms' gradients were."""
        if self.balance is not None:
            self.balance.update()

    def step(self, batch: Batch) -> Output:
        """As in the base class, but the input is encoded once for `embed` and `losses` together."""
        views = self.views(batch)
        tokens_BND, targets_BPK = self.encode(views), self.targets(views)
        own = self.meet(batch, views, tokens_BND, targets_BPK)
        everyone = {name: gather(x, self.scope(batch.step)) for name, x in (own.shared | own.constant).items()}
        return combine(self.sums(batch, views, tokens_BND, targets_BPK, own, everyone), self.weights(batch.step))

    def embed(self, batch: Batch) -> Embedded:
        """Return what meets other samples: both sides of the caption target, and sampled image targets."""
        views = self.views(batch)
        tokens_BND = self.encode(views) if self.config.has_text else None
        targets_BPK = self.targets(views) if self._has_negatives else None
        return self.meet(batch, views, tokens_BND, targets_BPK)

    def losses(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> Sums:
        """Return -log P of every target group."""
        views = self.views(batch)
        return self.sums(batch, views, self.encode(views), self.targets(views), own, everyone)

    def counts(self, batch: Batch, own: Embedded, everyone: Mapping[str, Gathered]) -> dict[str, Tensor]:
        """Known from masks, labels and captions alone."""
        counts, readings = {}, self.views(batch).readings
        if self.form is not None:
            counts = {reading.name: reading.counted.sum() for reading in readings}
        if self.category is not None:
            counts["category"] = len(readings) * (_labels(batch) >= 0).sum()
        if self.config.has_text:
            counts["text"] = len(readings) * _is_captioned(batch).sum()
        return counts

    def weights(self, step: int) -> dict[str, float]:
        """Return the terms' weights, balanced if asked for."""
        weights = self._plain_weights(step)
        if self.balance is None:
            return weights
        scales = self.balance.scales()
        return {name: weight * scales[name] for name, weight in weights.items()}

    def views(self, batch: Batch, config: M3iConfig | None = None) -> Views:
        """Make the inputs of a batch."""
        drops = self.towers.image.drops_patches
        return look(batch, config or self.config, side=self.image_size, grid=self.grid, drops_patches=drops)

    def meet(self, batch: Batch, views: Views, tokens_BND: Tensor | None, targets_BPK: Tensor | None) -> Embedded:
        """Return the embeddings of pictures (as each reading has them) and captions, and the sampled image targets."""
        shared: dict[str, Tensor] = {}
        constant: dict[str, Tensor] = {}
        if isinstance(self.towers, Towers) and tokens_BND is not None:
            tapped_BND = self._tap("text", tokens_BND, batch.step)
            for reading in views.readings:
                z_BE = unit(self.towers.image_projection(self.pool(tapped_BND, reading)))
                shared[f"image_{reading.name}"] = reading.in_order(z_BE)
            shared["text"] = self.encode_text(batch.captions)
            constant["captioned"] = _is_captioned(batch).float()
        if self._has_negatives and targets_BPK is not None:
            constant["negatives"] = _drawn(batch, targets_BPK, self.config.negative_places)
        return Embedded(shared=shared, constant=constant)

    def sums(
        self,
        batch: Batch,
        views: Views,
        tokens_BND: Tensor,
        targets_BPK: Tensor | None,
        own: Embedded,
        everyone: Mapping[str, Gathered],
    ) -> Sums:
        """Return every term of eq. 4 with its count."""
        losses: dict[str, LossSum] = {}
        metrics: dict[str, LossSum] = {}
        if targets_BPK is not None:
            correlation_KK = _correlation(everyone)
            for reading in views.readings:
                prediction_BPK = self.predict(self._tap(reading.name, tokens_BND, batch.step), views, reading)
                losses[reading.name] = feature_prediction(
                    prediction_BPK,
                    reading.of(targets_BPK),
                    reading.counted,
                    correlation_DD=correlation_KK,
                    negative_weight=self.config.negative_weight,
                )
        if self.category is not None:
            tapped_BND = self._tap("category", tokens_BND, batch.step)
            logits = [(self.category(self.pool(tapped_BND, reading)), reading) for reading in views.readings]
            losses["category"] = _added([classification(x_BC, r.of(_labels(batch))) for x_BC, r in logits])
        if isinstance(self.towers, Towers):
            metrics["logit_scale"] = mean_of(scale(self.towers.log_scale))
            metrics["captions_cut"] = captions_cut(self.tokenizer, batch)
            names = [f"image_{reading.name}" for reading in views.readings]
            losses["text"] = _added([self._contrast(name, own, everyone) for name in names])
        return Sums(losses=losses, metrics=metrics)

    def _plain_weights(self, step: int) -> dict[str, float]:
        return self.config.weights(step, has_category=self.category is not None)

    def _contrast(self, name: str, own: Embedded, everyone: Mapping[str, Gathered]) -> LossSum:
        assert isinstance(self.towers, Towers)
        pair, others = (own.shared[name], own.shared["text"]), (everyone[name], everyone["text"])
        return info_nce(*pair, *others, scale(self.towers.log_scale), everyone["captioned"])

    def _tap(self, name: str, tokens_BND: Tensor, step: int) -> Tensor:
        return tokens_BND if self.balance is None else self.balance.tap(name, tokens_BND, self.weights(step)[name])

    @property
    def _has_negatives(self) -> bool:
        return self.target is not None and self.config.negative_weight > 0

    def show(self, batch: Batch) -> Shown | None:
        """Return the views and the inputs that are made of them; a few pictures are all each other's partners.

        With a pixel target the prediction as well, each patch lent the true one's mean and deviation.
        """
        config = self.config.model_copy(update={"mix_group": len(batch.captions)})
        views = self.views(batch, config)
        pictures, captions = show_views(views), {"caption": batch.captions}
        if self.category is not None:
            captions["category"] = [self.classes[i] if i >= 0 else "" for i in _labels(batch).tolist()]
        if self.form is not None and self.form.target == "pixels":
            predicted_BNK = self.predict(self.encode(views), views, views.readings[0])
            patches_BNK = denormalised_patches(predicted_BNK, patchify(views.target, self.patch_size))
            pictures["prediction"] = to_pictures(unpatchify(patches_BNK, self.patch_size))
        return Shown(pictures=pictures, captions=captions)


def _drawn(batch: Batch, targets_BPK: Tensor, num_places: int) -> Tensor:
    """Return targets at `num_places` places of every picture, drawn by sample: they stand for all targets."""
    drawn_BP = random.bits(batch.seed, batch.sample_ids, batch.epoch, "negatives", targets_BPK.shape[1])
    return take_tokens(targets_BPK, drawn_BP.argsort(dim=1, stable=True)[:, :num_places])


def _correlation(everyone: Mapping[str, Gathered]) -> Tensor | None:
    """C, [K, K]: the mean of t t^T over the drawn targets of all pictures that meet; None if none are drawn."""
    if "negatives" not in everyone:
        return None
    targets_GPK = everyone["negatives"].features
    return outer_products(targets_GPK) / (targets_GPK.shape[0] * targets_GPK.shape[1])


def _labels(batch: Batch) -> Tensor:
    """int64 [B]: the categories, -1 where there is none."""
    return torch.full_like(batch.sample_ids, -1) if batch.labels is None else batch.labels


def _is_captioned(batch: Batch) -> Tensor:
    """bool [B]: who has a caption."""
    return torch.tensor([bool(caption.strip()) for caption in batch.captions], device=batch.images.device)


def _added(terms: Sequence[LossSum]) -> LossSum:
    """One term of those of all readings."""
    return LossSum(torch.stack([term.sum for term in terms]).sum(), torch.stack([term.count for term in terms]).sum())
