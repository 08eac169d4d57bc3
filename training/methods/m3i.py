"""M3I (Su et al. 2023): one input that shows two pictures predicts both pictures, their categories and their captions.

L = sum over the target groups of -log P(z_y | z^_y) (eq. 4), with z_x = f_theta(input) the encoded input, z_y a target
of one of its pictures, and z^_y = f_psi(z_x) its prediction.

Legend: B batch, C colours, S side, N features of a view, D encoder width, K values predicted for a place, E width of
the space shared with text, P places, G pictures that meet.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from cluster.errors import RequestError
from training import random
from training.data.tokenizer import Tokenizer
from training.data.transforms import evaluation_view
from training.losses.classification import classification
from training.losses.distributed import Gathered, LossSum, gather
from training.losses.feature_prediction import feature_prediction, outer_products, plain_norm
from training.losses.info_nce import info_nce
from training.losses.pixels import denormalised_patches, normalised_patches, patchify, unpatchify
from training.losses.similarity import scale, unit
from training.methods.base import Batch, CaptionNeed, Embedded, Method, Output, Shown, Sums, combine, mean_of
from training.methods.m3i_balance import Balance
from training.methods.m3i_forms import M3iConfig
from training.methods.m3i_views import Reading, Views, look, show_views
from training.methods.views import captions_cut, read_captions, refuse_trained_pooling, to_pictures
from training.models.blocks import take_tokens
from training.models.config import ModelConfig
from training.models.encoders import Encoders
from training.models.image_encoder import build_image_encoder
from training.models.pooling import Pooling
from training.models.predictor import Predictor
from training.models.relative import own_places, relative_places
from training.models.towers import Towers
from training.momentum import follow, momentum_at, momentum_copy

HEAD_WIDTH = 64
"""Of the attention pooling."""


class M3i(Method):
    """Multi-input, multi-target pre-training, and the single objectives that it is made of."""

    name: ClassVar[str] = "m3i"
    config_type: ClassVar[type[M3iConfig]] = M3iConfig
    without_captions: ClassVar[str] = "m3i.text=false"

    def __init__(
        self, config: M3iConfig, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str] = ()
    ) -> None:
        super().__init__(config, model, tokenizer)
        self.config, self.form = config, config.image_form
        self.tokenizer, self.image_size = tokenizer, model.vision.image_size
        has_category = config.has_category(has_labels=bool(classes))
        self.towers: Towers | Encoders
        if config.has_text:
            ids = {"vocabulary_size": tokenizer.vocabulary_size, "end_of_text_id": tokenizer.end_of_text_id}
            self.towers = Towers(model, **ids)
        else:
            self.towers = Encoders(build_image_encoder(model.vision))
        width, self.grid = self.towers.image.width, self.towers.image.grid
        self.patch_size = self.image_size // self.grid
        self.readout = Pooling("map", width, max(1, width // HEAD_WIDTH)) if config.has_text or has_category else None
        self.category = nn.Linear(width, len(classes)) if has_category else None
        self.classes = tuple(classes)
        self.predictor, self.target = None, None
        if self.form is not None:
            values = 3 * self.patch_size**2 if self.form.target == "pixels" else width
            self.predictor = Predictor(width, config.predictor.shape, values)
            self.target = None if self.form.target == "pixels" else momentum_copy(self.towers.image)
        self.balance = Balance(list(self._plain_weights(0))) if config.balance else None

    @classmethod
    def build(cls, config: Any, model: ModelConfig, tokenizer: Tokenizer, classes: Sequence[str]) -> Self:
        """Return the method with fresh weights and a category embedding for each class."""
        return cls(config, model, tokenizer, classes)

    @classmethod
    def check(cls, config: Any, model: ModelConfig, *, part_size: int, has_labels: bool) -> None:
        """Raise RequestError for a request that cannot work."""
        vision = model.vision
        refuse_trained_pooling(cls.name, vision, "model.vision")
        if vision.kind == "timm":
            raise RequestError(
                f"model.vision.timm={vision.timm}: m3i reads patches and would leave the model's own pooling "
                "untrained; use a ViT or an InternImage"
            )
        patch = vision.image_size // math.isqrt(vision.num_patches)
        config.refuse_unfit(vision.image_size, patch, part_size=part_size, has_labels=has_labels)

    @classmethod
    def needs_captions(cls, config: Any) -> CaptionNeed:
        """Only where they are predicted; a sample without one has no such term."""
        return "some" if config.has_text else "none"

    @classmethod
    def has_text_features(cls, config: Any) -> bool:
        """With a text target."""
        return bool(config.has_text)

    def before_step(self, step: int, num_steps: int) -> None:
        """Move the target encoder, f_phi."""
        if self.target is not None:
            # At step 0 it is the encoder, wherever that has its weights from.
            momentum = momentum_at(step, num_steps, start=self.config.momentum) if step else 0.0
            pairs = zip(self.target.parameters(), self.towers.image.parameters(), strict=True)
            follow(pairs, momentum)

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
            counts = {reading.name: self._counted(reading).sum() for reading in readings}
        if self.category is not None:
            counts["category"] = len(readings) * (_labels(batch) >= 0).sum()
        if self.config.has_text:
            counts["text"] = len(readings) * _has_caption(batch).sum()
        return counts

    def weights(self, step: int) -> dict[str, float]:
        """Return the terms' weights, balanced if asked for.

        Eq. 4 adds up target groups, so categories and captions weigh as often as an input has pictures.
        """
        weights = self._plain_weights(step)
        if self.balance is None:
            return weights
        scales = self.balance.scales()
        return {name: weight * scales[name] for name, weight in weights.items()}

    def views(self, batch: Batch, config: M3iConfig | None = None) -> Views:
        """Make the inputs of a batch."""
        drops = self.towers.image.drops_patches
        return look(batch, config or self.config, side=self.image_size, grid=self.grid, drops_patches=drops)

    def encode(self, views: Views) -> Tensor:
        """Return z_x = f_theta(input), [B, N, D]; of the kept patches alone where some are left out."""
        image = self.towers.image
        return image.patches(image(views.input) if views.keep is None else image(views.input, views.keep))

    @torch.no_grad()
    def targets(self, views: Views) -> Tensor | None:
        """Return z_y of every picture: [B, N, K], or [B, 1, K] of the whole view; None without image targets."""
        if self.form is None:
            return None
        if self.target is None:
            return normalised_patches(patchify(views.target, self.patch_size))
        features_BND = self.target.patches(self.target(views.target)).float()
        return plain_norm(features_BND.mean(1, keepdim=True) if self.form.target == "global" else features_BND)

    def meet(self, batch: Batch, views: Views, tokens_BND: Tensor | None, targets_BPK: Tensor | None) -> Embedded:
        """Return the embeddings of pictures (as each reading has them) and captions, and the sampled image targets."""
        shared: dict[str, Tensor] = {}
        constant: dict[str, Tensor] = {}
        if isinstance(self.towers, Towers) and tokens_BND is not None:
            tapped_BND = self._tap("text", tokens_BND, batch.step)
            for reading in views.readings:
                z_BE = unit(self.towers.image_projection(self._pool(tapped_BND, reading)))
                in_order_B = None if reading.picture is None else reading.picture.argsort()
                shared[f"image_{reading.name}"] = z_BE if in_order_B is None else z_BE[in_order_B]
            shared["text"] = self._embed_text(batch.captions)
            constant["captioned"] = _has_caption(batch).float()
        if self._has_negatives and targets_BPK is not None:
            num_places = min(self.config.negative_places, targets_BPK.shape[1])
            drawn_BP = random.bits(batch.seed, batch.sample_ids, batch.epoch, "negatives", targets_BPK.shape[1])
            constant["negatives"] = take_tokens(targets_BPK, drawn_BP.argsort(dim=1, stable=True)[:, :num_places])
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
                    self._counted(reading),
                    correlation_DD=correlation_KK,
                    negative_weight=self.config.negative_weight,
                )
        if self.category is not None:
            tapped_BND = self._tap("category", tokens_BND, batch.step)
            logits = [(self.category(self._pool(tapped_BND, reading)), reading) for reading in views.readings]
            losses["category"] = _added([classification(x_BC, r.of(_labels(batch))) for x_BC, r in logits])
        if isinstance(self.towers, Towers):
            metrics["logit_scale"] = mean_of(scale(self.towers.log_scale))
            metrics["captions_cut"] = captions_cut(self.tokenizer, batch)
            names = [f"image_{reading.name}" for reading in views.readings]
            losses["text"] = _added([self._contrast(name, own, everyone) for name in names])
        return Sums(losses=losses, metrics=metrics)

    def predict(self, tokens_BND: Tensor, views: Views, reading: Reading) -> Tensor:
        """Return z^_y = f_psi(z_x, t_x, t_y), [B, N, K], for the target view of the reading's picture.

        A global target is predicted by the mean over the places, [B, 1, K].
        """
        assert self.predictor is not None
        assert self.form is not None
        own_BN4 = own_places(self.grid, tokens_BND.device).expand(len(tokens_BND), -1, -1)
        own_BV4 = own_BN4 if reading.index is None else take_tokens(own_BN4, reading.index)
        target_box_B4 = reading.of(views.target_box)
        target_BN4 = relative_places(reading.box, target_box_B4, input_grid=self.grid, target_grid=self.grid)
        predicted: Tensor = self.predictor(reading.pick(tokens_BND), own_BV4, target_BN4, reading.keys)
        return predicted.float().mean(1, keepdim=True) if self.form.target == "global" else predicted

    def _counted(self, reading: Reading) -> Tensor:
        """bool: which predictions count."""
        assert self.form is not None
        return torch.ones_like(reading.counted[:, :1]) if self.form.target == "global" else reading.counted

    def _pool(self, tokens_BND: Tensor, reading: Reading) -> Tensor:
        """Return [B, D]: attention pooling over the features that show the reading's picture."""
        assert self.readout is not None
        pooled_BD: Tensor = self.readout(reading.pick(tokens_BND), reading.keys)
        return pooled_BD

    def _contrast(self, name: str, own: Embedded, everyone: Mapping[str, Gathered]) -> LossSum:
        assert isinstance(self.towers, Towers)
        pair, others = (own.shared[name], own.shared["text"]), (everyone[name], everyone["text"])
        return info_nce(*pair, *others, scale(self.towers.log_scale), everyone["captioned"])

    def _embed_text(self, captions: Sequence[str]) -> Tensor:
        assert isinstance(self.towers, Towers)
        ids_BL = read_captions(self.tokenizer, captions, self.towers.log_scale.device).ids
        return unit(self.towers.embed_text(ids_BL))

    def _tap(self, name: str, tokens_BND: Tensor, step: int) -> Tensor:
        return tokens_BND if self.balance is None else self.balance.tap(name, tokens_BND, self.weights(step)[name])

    def _plain_weights(self, step: int) -> dict[str, float]:
        config, weights = self.config, {}
        if self.form is not None and (config.mixes or self.form.same_view):
            weights["intra"] = config.intra_weight.at(step)
        if self.form is not None and not self.form.same_view:
            weights["inter"] = config.inter_weight.at(step)
        num_pictures = 2 if config.mixes else 1
        if self.category is not None:
            weights["category"] = num_pictures * config.category_weight.at(step)
        if config.has_text:
            weights["text"] = num_pictures * config.text_weight.at(step)
        return weights

    @property
    def _has_negatives(self) -> bool:
        return self.target is not None and self.config.negative_weight > 0

    def encode_image(self, images_BHWC: Tensor) -> Tensor:
        """Return L2-normalised float32 features of whole pictures, in the space shared with text if there is one."""
        image = self.towers.image
        tokens_BND = image.patches(image(evaluation_view(images_BHWC, self.image_size)))
        if self.readout is None:
            return unit(tokens_BND.float().mean(1))
        pooled_BD = self.readout(tokens_BND)
        return unit(self.towers.image_projection(pooled_BD) if isinstance(self.towers, Towers) else pooled_BD)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return L2-normalised float32 [B, E] of captions; RequestError without a text target."""
        return self._embed_text(captions) if self.config.has_text else super().encode_text(captions)

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
            truth_BNK = patchify(views.target, self.patch_size)
            made_BCSS = unpatchify(denormalised_patches(predicted_BNK, truth_BNK), self.patch_size)
            pictures["prediction"] = to_pictures(made_BCSS)
        return Shown(pictures=pictures, captions=captions)


def _correlation(everyone: Mapping[str, Gathered]) -> Tensor | None:
    """C, [K, K]: the mean of t t^T over the sampled targets of all pictures that meet."""
    if "negatives" not in everyone:
        return None
    targets_GPK = everyone["negatives"].features
    return outer_products(targets_GPK) / (targets_GPK.shape[0] * targets_GPK.shape[1])


def _labels(batch: Batch) -> Tensor:
    return torch.full_like(batch.sample_ids, -1) if batch.labels is None else batch.labels


def _has_caption(batch: Batch) -> Tensor:
    """bool [B]."""
    return torch.tensor([bool(caption.strip()) for caption in batch.captions], device=batch.images.device)


def _added(terms: Sequence[LossSum]) -> LossSum:
    return LossSum(torch.stack([term.sum for term in terms]).sum(), torch.stack([term.count for term in terms]).sum())
