"""What a list says of a row's image beside its caption: the hash of its bytes, and boxes that have to be blurred."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import ColumnsConfig, HashName
from pipeline.picture import Boxes, ImageError
from pipeline.plain import plain_values
from pipeline.readers.schema import RESERVED
from pipeline.reasons import Reason

FARTHEST = 2.0
"""A box reaches out of its image now and then; one that reaches farther is in pixels or no box at all."""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """One entry a row, or none at all where the list has no such column. Null in a row claims nothing."""

    hashes: Sequence[Any] = ()
    hash_name: HashName = "sha256"
    boxes: Sequence[Any] = ()

    @staticmethod
    def of(planned: pa.Table, columns: ColumnsConfig, hash_name: HashName | None) -> "Claims":
        """Those of a unit's rows."""

        def values(name: str | None) -> Sequence[Any]:
            output = None if name is None else _output_name(planned, name)
            return plain_values(planned[output]) if output in planned.column_names else ()  # imports have no hashes

        return Claims(hashes=values(columns.hash), hash_name=hash_name or "sha256", boxes=values(columns.boxes))

    def check_hash(self, row: int, body: bytes) -> None:
        """Raise ImageError unless the body has the hash that is claimed; upper and lower case are the same."""
        claimed = self.hashes[row] if self.hashes else None
        if claimed is None:
            return
        found = hashlib.new(self.hash_name, body).hexdigest()
        if str(claimed).strip().lower() != found:
            raise ImageError(Reason.HASH_MISMATCH, f"{self.hash_name} is {found}")

    def boxes_of(self, row: int) -> Boxes:
        """What is to be blurred. Raises ImageError rather than let pass an image whose boxes cannot be read."""
        claimed = self.boxes[row] if self.boxes else None
        if claimed is None or claimed == "":
            return []
        try:
            boxes = json.loads(claimed) if isinstance(claimed, str) else claimed
            if isinstance(boxes, list) and all(_is_box(box) for box in boxes):
                return [[float(number) for number in box] for box in boxes]
        except ValueError:
            pass
        raise ImageError(Reason.BAD_BOXES, str(claimed)[:200])


def _output_name(planned: pa.Table, name: str) -> str:
    """What a list's column `name` is called here: `source_` comes before reserved names, as often as it takes."""
    if name in RESERVED:
        name = f"source_{name}"
        while f"source_{name}" in planned.column_names:
            name = f"source_{name}"
    return name


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list | tuple)
        and len(box) == 4
        and all(isinstance(number, int | float) and math.isfinite(number) for number in box)
        and all(1 - FARTHEST <= number <= FARTHEST for number in box)
        and box[0] <= box[2]  # [x, y, width, height] and the like: nothing would be blurred
        and box[1] <= box[3]
    )
