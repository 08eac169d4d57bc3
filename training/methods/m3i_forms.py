"""What M3I can predict from what: its settings, and the 12 self-supervised forms of its table 2 by name."""

import math
from dataclasses import dataclass
from typing import Literal

from cluster.config import key
from cluster.errors import RequestError
from training.methods.base import CropScale, MethodConfig
from training.methods.m3i_mix import MaskKind
from training.models.config import VisionConfig
from training.models.predictor import PredictorConfig
from training.schedule import Schedule

FormName = Literal[
    "m3i",
    "m3i_without_mix",
    "none",
    "auto_encoder",
    "dense_distillation",
    "global_distillation",
    "mim_pixel",
    "mim_feature",
    "mim_global",
    "novel_view_synthesis",
    "dense_instance_discrimination",
    "instance_discrimination",
    "siamese_pixel",
    "siamese_feature",
    "masked_instance_discrimination",
]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One input view and the target that it predicts."""

    masked: bool
    """Whether part of the input is hidden."""
    same_view: bool
    """Whether the target is of the input view itself (intra-view) or of another one (inter-view)."""
    target: Literal["pixels", "features", "global"]
    """Of every patch its pixels or its momentum feature, or one momentum feature of the whole view."""


FORMS: dict[FormName, Form] = {
    "auto_encoder": Form(masked=False, same_view=True, target="pixels"),
    "dense_distillation": Form(masked=False, same_view=True, target="features"),
    "global_distillation": Form(masked=False, same_view=True, target="global"),
    "mim_pixel": Form(masked=True, same_view=True, target="pixels"),
    "mim_feature": Form(masked=True, same_view=True, target="features"),
    "mim_global": Form(masked=True, same_view=True, target="global"),
    "novel_view_synthesis": Form(masked=False, same_view=False, target="pixels"),
    "dense_instance_discrimination": Form(masked=False, same_view=False, target="features"),
    "instance_discrimination": Form(masked=False, same_view=False, target="global"),
    "siamese_pixel": Form(masked=True, same_view=False, target="pixels"),
    "siamese_feature": Form(masked=True, same_view=False, target="features"),
    "masked_instance_discrimination": Form(masked=True, same_view=False, target="global"),
}
"""Table 2 (a) to (l), in its order. "M3I w/o mix" is (k) with categories (table 3's footnote)."""


class M3iConfig(MethodConfig):
    """Keys of M3I. Where the paper is silent, the defaults are those of SiameseIM, which it builds on."""

    crop_scale: CropScale = key((0.2, 1.0), "least and most share of a picture's area that a crop keeps")
    flip: bool = key(True, "mirror half of the views")
    form: FormName = key(
        "m3i",
        "image target: the mix of two pictures, the same without mixing, none, or a self-supervised form of table 2",
    )
    category: bool | None = key(
        None, "predict categories too; null: with forms m3i, m3i_without_mix and none, where the data has some"
    )
    text: bool | None = key(None, "predict captions too; null: with forms m3i, m3i_without_mix and none")
    mask_ratio: float = key(
        0.6, "share of the cells that are hidden; with a mix, that show the second picture", gt=0, lt=1
    )
    mask: MaskKind = key("block", "cells to hide: in rectangles, or any")
    mix_patch: int | None = key(
        None,
        "p, side of a cell; null: that of the encoder's patch (16 for ViT-B/16), or of its last map",
        unit="px",
        ge=1,
    )
    mix_group: int = key(2, "consecutive samples among which partners are drawn; divides a rank's part", ge=2)
    momentum: float = key(0.995, "of the target encoder at the first step; a cosine leads to 1 at the end", ge=0, le=1)
    intra_weight: Schedule = key(Schedule(value=1.0), "of predicting the input view itself")
    inter_weight: Schedule = key(Schedule(value=1.0), "of predicting another view")
    category_weight: Schedule = key(Schedule(value=1.0), "of each input picture's category")
    text_weight: Schedule = key(Schedule(value=1.0), "of each input picture's caption")
    negative_weight: float = key(0.02, "of what a predicted feature shares with all targets, beside its error", ge=0)
    negative_places: int = key(4, "places of each picture that stand for all targets there", ge=1)
    balance: bool = key(
        False, "scale the terms' weights so that all gradients at the encoder's output are as long as their mean"
    )
    predictor: PredictorConfig = key(PredictorConfig(), "the decoder of image targets")

    @property
    def mixes(self) -> bool:
        """Whether an input shows two pictures."""
        return self.form == "m3i"

    @property
    def image_form(self) -> Form | None:
        """What the image target is; with the mix, of the second picture, and the first predicts its own view too."""
        return FORMS["siamese_feature"] if self.form in ("m3i", "m3i_without_mix") else FORMS.get(self.form)

    @property
    def has_text(self) -> bool:
        """Whether captions are predicted."""
        return self._on(self.text)

    def has_category(self, *, has_labels: bool) -> bool:
        """Whether categories are predicted."""
        return self._on(self.category) and (has_labels or self.category is True)

    def _on(self, wanted: bool | None) -> bool:
        return self.form not in FORMS if wanted is None else wanted

    def weights(self, step: int, *, has_category: bool) -> dict[str, float]:
        """Return the weight of every term at a step.

        Eq. 4 adds up target groups, so categories and captions weigh as often as an input has pictures.
        """
        weights, form, num_pictures = {}, self.image_form, 2 if self.mixes else 1
        if form is not None and (self.mixes or form.same_view):
            weights["intra"] = self.intra_weight.at(step)
        if form is not None and not form.same_view:
            weights["inter"] = self.inter_weight.at(step)
        if has_category:
            weights["category"] = num_pictures * self.category_weight.at(step)
        if self.has_text:
            weights["text"] = num_pictures * self.text_weight.at(step)
        return weights

    def refuse_unfit(self, vision: VisionConfig, *, part_size: int, has_labels: bool) -> None:
        """Raise RequestError for a request that cannot work; see `Method.check`."""
        if self.category and not has_labels:
            raise RequestError("m3i.category=true: the data has no categories; name their column in data.label_column")
        if self.form == "none" and not (self.has_text or self.has_category(has_labels=has_labels)):
            raise RequestError("m3i.form=none: nothing is left to predict; set m3i.text or m3i.category")
        if vision.kind == "timm":
            raise RequestError(
                f"model.vision.timm={vision.timm}: m3i reads patches and would leave the model's own pooling "
                "untrained; use a ViT or an InternImage"
            )
        side, form = vision.image_size, self.image_form
        cell = self.mix_patch or side // math.isqrt(vision.num_patches)
        if form is not None and form.masked and (side % cell or side == cell):
            raise RequestError(
                f"m3i.mix_patch={cell}: does not divide model.vision.image_size={side} into several cells"
            )
        if self.mixes and part_size % self.mix_group:
            raise RequestError(
                f"m3i.mix_group={self.mix_group}: does not divide the {part_size} samples that a rank computes at once "
                "(train.batch_size / ranks / train.accumulation)"
            )
