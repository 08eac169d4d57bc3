"""What was dropped: a few pairs of every reason, as groups of duplicates, as pictures, or as text."""

from dataclasses import dataclass
from typing import Any

from cluster.report import environment
from pipeline.reasons import Reason
from pipeline.report.data import TEMPLATES, Step, meaning
from pipeline.report.duplicates import Twins, groups_of
from pipeline.report.pictures import Album, Picture

NUM_DROPPED_SHOWN, NUM_TEXTS_SHOWN = 8, 4


@dataclass(frozen=True, kw_only=True)
class DropGroup:
    """Examples of one reason."""

    reason: str
    meaning: str
    num_rows: int
    groups: tuple[tuple[Picture, ...], ...] = ()
    pictures: tuple[Picture, ...] = ()
    rows: tuple[Picture, ...] = ()


def dropped_html(album: Album, twins: Twins, steps: list[Step]) -> str:
    """Every reason of the sample, in the order in which pairs are dropped."""
    found = [_group(album, twins, step) for step in steps]
    shown = [group for group in found if group.groups or group.pictures or group.rows]
    if not shown:
        return "<p>Nothing was dropped.</p>"
    return environment(TEMPLATES).get_template("dropped.html").render(groups=shown)


def _group(album: Album, twins: Twins, step: Step) -> DropGroup:
    groups = groups_of(album, twins, step.reason)
    pictures: list[Picture] = []
    if not groups:
        indices = twins.sampled.find("dropped", step.reason)[:NUM_DROPPED_SHOWN]
        rows = [twins.sampled.row(index) for index in indices]
        pictures = [album.picture(row, why(row)) for row in rows]
    shown = tuple(picture for picture in pictures if picture.image)
    return DropGroup(
        reason=step.reason,
        meaning=meaning(step.reason),
        num_rows=step.num_rows,
        groups=groups,
        pictures=shown,
        rows=() if shown else tuple(pictures[:NUM_TEXTS_SHOWN]),
    )


def why(row: dict[str, Any]) -> str:
    """What was measured, for a dropped pair."""
    parts = []
    if row["rule"] and row["score"] is not None:
        limit = "" if row["threshold"] is None else f", limit {row['threshold']:.4g}"
        name = "chance to stay" if row["reason"] == Reason.BALANCED_OUT else row["rule"]
        parts.append(f"{name}: {row['score']:.4g}{limit}")
    if row["detail"]:
        parts.append(str(row["detail"]))
    return "; ".join(parts)
