"""What an input of M3I shows, and what is read from it.

A reading is what one encoded input says about one picture of the batch. With the mix there are two: picture i, of
which the input shows the target view itself, and picture j = sigma(i), of which it shows another view. Without the mix
there is one.

Legend: B batch, C colours, S side, G side of the mask's grid, N features of a view, P places that are predicted, V
features of an input that a reading looks at, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.transforms import normalise, resample, view_boxes
from training.methods.m3i_forms import M3iConfig
from training.methods.m3i_mix import enlarge, hidden_cells, mix, partners, seen_features
from training.methods.values import Batch
from training.methods.views import to_pictures
from training.models.blocks import take_tokens


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an encoded input says about one picture."""

    name: str
    """intra (the input shows the target view) or inter (it shows another view)."""
    picture: Tensor | None
    """int64 [B]: which picture of the batch; None: the input's own."""
    box: Tensor
    """[B, 4]: the view of it that the input shows."""
    index: Tensor | None
    """int64 [B, V]: the input's features that show it; None: all, as far as `keys` says."""
    keys: Tensor | None
    """bool [B, N]: those features, where their number differs between samples; else None."""
    counted: Tensor
    """bool [B, N]: places of the target view that are predicted: in one's own view only what is hidden, if anything;
    [B, 1] where one feature of the whole view is."""

    def of(self, rows_B: Tensor) -> Tensor:
        """The rows of the pictures that it is about."""
        return rows_B if self.picture is None else rows_B[self.picture]

    def in_order(self, read_B: Tensor) -> Tensor:
        """What was read of the pictures, in the order of the pictures: the inverse of `of`."""
        return read_B if self.picture is None else read_B[self.picture.argsort()]

    def pick(self, tokens_BND: Tensor) -> Tensor:
        """[B, V, D]: the features that show the picture; all of them where the encoder saw no others."""
        if self.index is None or self.index.shape[1] == tokens_BND.shape[1]:
            return tokens_BND
        return take_tokens(tokens_BND, self.index)


@dataclass(frozen=True, kw_only=True)
class Views:
    """The inputs of a batch, and what they are about."""

    target_box: Tensor
    """[B, 4]: see `view_boxes`."""
    target: Tensor
    """[B, C, S, S]: the view of every picture that is to be predicted."""
    other: Tensor
    """[B, C, S, S]: another view of the same pictures; the target view itself where the form has only one."""
    input: Tensor
    """[B, C, S, S]: what is encoded."""
    keep: Tensor | None
    """int64 [B, V]: the only patches of it to be encoded; None: all."""
    hidden: Tensor | None
    """bool [B, G, G]: cells of the input that are hidden, or show the second picture."""
    second: Tensor | None
    """int64 [B]: sigma, the second picture of each input."""
    readings: tuple[Reading, ...]


def look(batch: Batch, config: M3iConfig, *, side: int, grid: int, drops_patches: bool) -> Views:
    """Cut the views of a batch and make its inputs.

    side: of a view, in pixels. grid: features of the encoder along a side. drops_patches: it can leave patches out.
    """
    draw = (batch.seed, batch.sample_ids, batch.epoch)
    target_box_B4, target_BCSS = _cut(batch, config, side, "crop")
    form = config.image_form
    one_view = form is None or (form.same_view and not config.mixes)
    box_B4, other_BCSS = (target_box_B4, target_BCSS) if one_view else _cut(batch, config, side, "crop/other")
    name = "intra" if one_view else "inter"
    is_global = form is not None and form.target == "global"
    num_places = 1 if is_global else grid * grid
    all_BP = torch.ones(len(target_BCSS), num_places, dtype=torch.bool, device=target_BCSS.device)
    input_BCSS, hidden_BGG, keep_BV, second_B = other_BCSS, None, None, None
    readings: tuple[Reading, ...]
    if form is None or not form.masked:
        readings = (Reading(name=name, picture=None, box=box_B4, index=None, keys=None, counted=all_BP),)
    else:
        cells = side // config.mix_patch if config.mix_patch else grid
        hidden_BGG = hidden_cells(*draw, grid=cells, ratio=config.mask_ratio, kind=config.mask)
        shown_BN, index_BV, keys_BN = _features(~hidden_BGG, grid)
        only_hidden = (one_view or config.mixes) and not is_global
        first_box_B4 = target_box_B4 if config.mixes else box_B4
        first = Reading(
            name="intra" if config.mixes else name,
            picture=None,
            box=first_box_B4,
            index=index_BV,
            keys=keys_BN,
            counted=~shown_BN if only_hidden else all_BP,
        )
        readings = (first,)
        if config.mixes:
            second_B = partners(*draw, group=config.mix_group)
            input_BCSS = mix(target_BCSS, other_BCSS[second_B], hidden_BGG)
            _, index_BV, keys_BN = _features(hidden_BGG, grid)
            second = Reading(
                name="inter", picture=second_B, box=box_B4[second_B], index=index_BV, keys=keys_BN, counted=all_BP
            )
            readings = (first, second)
        elif drops_patches and cells == grid:
            keep_BV = index_BV
        else:
            input_BCSS = mix(input_BCSS, torch.zeros_like(input_BCSS), hidden_BGG)  # mean grey
    return Views(
        target_box=target_box_B4,
        target=target_BCSS,
        other=other_BCSS,
        input=input_BCSS,
        keep=keep_BV,
        hidden=hidden_BGG,
        second=second_B,
        readings=readings,
    )


def show_views(views: Views) -> dict[str, Tensor]:
    """The views, the mask (white where the first picture is shown), and the inputs."""
    pictures = {"target view": to_pictures(views.target)}
    if views.other is not views.target:
        pictures["other view"] = to_pictures(views.other)
    if views.hidden is not None:
        side = views.input.shape[-1]
        white_BSS = (~enlarge(views.hidden, side)).to(torch.uint8) * 255
        input_BCSS = views.input
        if views.second is not None:
            pictures["second picture"] = to_pictures(views.other[views.second])
        else:
            input_BCSS = mix(input_BCSS, torch.zeros_like(input_BCSS), views.hidden)
        pictures["mask"] = white_BSS[..., None].expand(-1, -1, -1, 3)
        pictures["input"] = to_pictures(input_BCSS)
    return pictures


@torch.no_grad()
def _cut(batch: Batch, config: M3iConfig, side: int, stream: str) -> tuple[Tensor, Tensor]:
    """A view of every picture: its box and its normalised pixels."""
    box_B4 = view_boxes(
        batch.seed, batch.sample_ids, batch.epoch, crop_scale=config.crop_scale, flip=config.flip, stream=stream
    )
    return box_B4, normalise(resample(batch.images, box_B4, side))


def _features(shown_BGG: Tensor, grid: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Which features stand for the shown cells, [B, N] bool: by index where every sample has as many, else by key."""
    shown_BN = seen_features(shown_BGG, grid)
    if shown_BGG.shape[-1] == grid:
        return shown_BN, shown_BN.nonzero()[:, 1].view(len(shown_BN), -1), None
    return shown_BN, None, shown_BN
