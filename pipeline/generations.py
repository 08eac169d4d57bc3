"""A dataset's generations: the build is number 0; each repair after it has stages of its own in the journal."""

import re
from itertools import count

from cluster.journal import Journal, Marker

_REPAIR = re.compile(r"repair-(\d+)-")


def stage_name(number: int, stage: str) -> str:
    """A generation's name of a stage."""
    return f"repair-{number:04}-{stage}" if number else stage


def generation_of(name: str) -> int:
    """The generation that a stage belongs to."""
    before = _REPAIR.match(name)
    return int(before.group(1)) if before else 0


def num_repairs(journal: Journal) -> int:
    """How many repairs were begun; the last one may not be finished."""
    return next(
        number for number in count() if not journal.store.exists(f"journal/{stage_name(number + 1, 'plan')}.json")
    )


def all_markers(journal: Journal, stage: str) -> list[Marker]:
    """The markers of a stage in every generation, oldest first."""
    numbers = range(num_repairs(journal) + 1)
    return [marker for number in numbers for marker in journal.markers(stage_name(number, stage)).values()]


def record_markers(journal: Journal, before: int | None = None) -> dict[str, Marker]:
    """The newest record marker of every fetch unit of the build: the one that vouches for `record/<unit>.parquet`.

    before: of generations before this one only.
    """
    last = num_repairs(journal) if before is None else before - 1
    newest = journal.markers("record")
    for number in range(1, last + 1):
        newest |= journal.markers(stage_name(number, "record"))
    return newest
