"""What a run leaves for people to look at: pictures and texts that the method shows of a few fixed samples.

    exhibits/step-00000100.json            {"step", "pictures": {title: [file, ...]}, "captions": {title: [text, ...]}}
    exhibits/step-00000100/0-picture.png   example 0, column "picture"; a file for every example and column

They are made with each checkpoint, so that one can see how reconstructions and captions come about.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cluster.store import Store
from training.methods import Batch, Method, Shown

FOLDER = "exhibits"
NUM_EXAMPLES = 8


class Exhibits:
    """Shows the same examples again and again. `make` is collective: every rank shows, the first one writes."""

    def __init__(self, store: Store, method: Method, *, active: bool) -> None:
        """active: whether this rank writes."""
        self._store, self._active = store, active
        self._shows = type(method).show is not Method.show
        self._batch: Batch | None = None

    def make(self, step: int, show: Callable[[Batch], Shown | None], examples: Callable[[], Batch]) -> None:
        """Show the examples after `step` steps, if the method has something to show of them."""
        if not self._shows:
            return
        if self._batch is None:
            self._batch = examples()
        shown = show(self._batch)
        if shown is not None and self._active:
            write(self._store, step, shown)


def write(store: Store, step: int, shown: Shown) -> None:
    """Store what is shown: the pictures first, then the file that names them."""
    name = f"{FOLDER}/step-{step:08}"
    files: dict[str, list[str]] = {}
    for title, pictures_NHWC in shown.pictures.items():
        files[title] = [f"{name}/{number}-{_plain(title)}.png" for number in range(len(pictures_NHWC))]
        for path, picture_HWC in zip(files[title], pictures_NHWC.cpu().numpy(), strict=True):
            store.write_bytes(path, encode_png(picture_HWC))
    content = {"step": step, "pictures": files, "captions": shown.captions}
    store.write_bytes(f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False).encode())


def read_all(store: Store) -> list[dict[str, Any]]:
    """Every exhibit of a run, by step, as `write` stored them."""
    paths = [entry.path for entry in store.find(FOLDER) if entry.path.endswith(".json")]
    return [json.loads(store.read_bytes(path)) for path in sorted(paths)]


def encode_png(picture_HWC: NDArray[np.uint8]) -> bytes:
    """A RGB picture as PNG."""
    _, data = cv2.imencode(".png", cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR))
    return data.tobytes()


def _plain(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
