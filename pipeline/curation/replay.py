"""What curation has decided in a folder, told by its journal: nothing is done for it."""

import json
from collections.abc import Callable
from typing import Any

from cluster.errors import PairmillError
from cluster.journal import Journal, Marker
from cluster.store import Store
from pipeline.against import known_shards
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context, Curated


class _UnfinishedError(Exception):
    """A stage has units without a marker."""


def replayed(store: Store, config: BuildConfig) -> Curated | None:
    """The decisions of a build (its repairs apart); None while some are to be taken, or when their files are gone."""
    journal = Journal(store)
    fetched = journal.markers("fetch")
    try:
        if _units(store, "fetch") - fetched.keys():
            return None
        known, num_known = known_shards(config)
        context = Context(config=config, store=store, run_stage=_finished(journal), known=known, num_known=num_known)
        return curate(context, fetched)
    except (_UnfinishedError, FileNotFoundError, PairmillError):
        return None


def _finished(journal: Journal) -> Callable[[Any], dict[str, Marker]]:
    def markers_of(stage: Any) -> dict[str, Marker]:
        markers, units = journal.markers(stage.name), [unit.id for unit in stage.units()]
        if any(unit not in markers for unit in units):
            raise _UnfinishedError(stage.name)
        return {unit: markers[unit] for unit in units}

    return markers_of


def _units(store: Store, stage: str) -> set[str]:
    """The units that a stage was begun with."""
    return set(json.loads(store.read_bytes(f"journal/{stage}.json"))["units"])
