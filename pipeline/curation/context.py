"""What a step of curation works with, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cluster.journal import Marker
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.generations import stage_name
from pipeline.manifest import Shard
from pipeline.selection import DecidedUnit, Drops, Groups

if TYPE_CHECKING:  # it needs pandas, which few runs do
    from pipeline.duplicates.captions import Alternatives

RunStage = Callable[[Any], dict[str, Marker]]
"""Brings a stage's units to their markers."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The run that a step belongs to.

    generation: 0 in a build, else the number of the repair. known: shards whose samples stay whatever comes, so that
    a newcomer that is their duplicate is dropped: those of the dataset that is repaired.
    """

    config: BuildConfig
    store: Store
    run_stage: RunStage
    generation: int = 0
    known: tuple[Shard, ...] = ()
    num_known: int = 0
    """samples in `known`"""

    def name(self, stage: str) -> str:
        """This generation's name of a stage."""
        return stage_name(self.generation, stage)


@dataclass(frozen=True, kw_only=True)
class Curated:
    """The fetch units in dataset order, and what was dropped of them so far.

    num_kept: rows of each unit that the rules kept, in unit order; the drops are not yet taken from it. groups: of
    units, a function of `num_kept`, for stages whose units of work are larger. facts_dtype: of the units' facts.
    """

    units: tuple[DecidedUnit, ...]
    num_kept: tuple[int, ...]
    groups: Groups
    facts_dtype: np.dtype[Any]
    drops: tuple[Drops, ...] = ()
    alternatives: "Alternatives | None" = None

    def without(self, drops: Drops) -> "Curated":
        """The same after a further step."""
        return replace(self, drops=(*self.drops, drops))


class Step(Protocol):
    """Compares the pairs that are left with one another; None when the configuration does not ask for it.

    A step is planned from markers alone and runs as stages of its own, so it may be stopped and go on anywhere. Its
    drops do not depend on the number of workers.
    """

    def __call__(self, context: Context, curated: Curated) -> Drops | None: ...
