"""What the stages of a build took: one entry per command and stage, so that resumed builds add up."""

import json
from dataclasses import asdict, dataclass

from cluster.store import Store

TIMINGS_FILE = "report/timings.json"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one command did of one stage.

    num_images were downloaded and decoded, num_bytes are those of all bodies; 0 for stages that fetch nothing.
    """

    stage: str
    wall_s: float
    num_units: int
    num_rows: int
    num_images: int
    num_bytes: int = 0


def add_timing(store: Store, timing: Timing) -> None:
    """Append an entry. The driver of the build is the one writer."""
    entries = [*read_timings(store), timing]
    store.write_bytes(TIMINGS_FILE, json.dumps([asdict(entry) for entry in entries], indent=1).encode())


def read_timings(store: Store) -> list[Timing]:
    """Every entry, in order of time."""
    try:
        plain = json.loads(store.read_bytes(TIMINGS_FILE))
    except FileNotFoundError:
        return []
    return [Timing(**entry) for entry in plain]


def images_per_s(timings: list[Timing]) -> float:
    """Images downloaded per second of the fetch stage; 0 when nothing was fetched."""
    return _per_s(timings, sum(timing.num_images for timing in timings))


def bytes_per_s(timings: list[Timing]) -> float:
    """Bytes of bodies downloaded per second of the fetch stage; 0 when nothing was fetched."""
    return _per_s(timings, sum(timing.num_bytes for timing in timings))


def _per_s(timings: list[Timing], number: int) -> float:
    wall_s = sum(timing.wall_s for timing in timings if timing.num_images)
    return number / wall_s if wall_s else 0.0
