"""Samples with their embeddings, as the stages of step semantic read them and hand them on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.store import Store
from pipeline.buckets import Records
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.exchange import facts_tasks, of_units, read_facts
from pipeline.duplicates.facts import needed_facts
from pipeline.duplicates.keys import read_known
from pipeline.models.stages import Embedded
from pipeline.selection import Drops, Groups

TASK_BYTES = 256 * 2**20
"""Embeddings that a task works on, about."""


def vector_dtype(dimension: int) -> np.dtype[Any]:
    """A sample with its embedding. rank: of several the smallest (rank, uid) is preferred, 0 is a known one."""
    return np.dtype(
        [
            ("rank", "<u8"),
            ("uid_high", "<u8"),
            ("uid_low", "<u8"),
            ("unit", "<u4"),
            ("row", "<u4"),
            ("cluster", "<u4"),
            ("vector", "<f2", (dimension,)),
        ]
    )


def tasks_of(curated: Curated, embedded: Sequence[Embedded]) -> tuple[Unit, ...]:
    """Units of a group with about `TASK_BYTES` of embeddings together: a group is ten times as much, and more."""
    tasks = []
    for task in facts_tasks(curated):
        begin = task.params["first_unit"]
        for first, end in _pieces(embedded[begin : task.params["end_unit"]]):
            of_task = embedded[begin + first : begin + end]
            part = {name: task.params[name][first:end] for name in ("files", "num_rows")}
            place = {"first_unit": begin + first, "end_unit": begin + end}
            params = {**task.params, **part, **place, **_embeddings(of_task)}
            tasks.append(replace(task, id=f"{task.id}-{first:05}", params=params))
    return tuple(tasks)


def known_tasks_of(context: Context, embedded: Sequence[Embedded]) -> tuple[Unit, ...]:
    """Known shards with about as much together."""
    paths = [shard.parquet.path for shard in context.known]
    tasks = []
    for first, end in _pieces(embedded):
        of_task = embedded[first:end]
        params = {"paths": paths[first:end], "facts_dtype": needed_facts(context.config), **_embeddings(of_task)}
        tasks.append(Unit(id=f"known-{embedded[first].id}", params=params))
    return tuple(tasks)


def num_tasks(size_bytes: int) -> int:
    """How many tasks work on so much."""
    return max(1, -(-size_bytes // TASK_BYTES))


def _pieces(embedded: Sequence[Embedded]) -> list[tuple[int, int]]:
    """(first, end) of runs of files with about `TASK_BYTES` together."""
    runs = Groups.of([each.size_bytes for each in embedded], TASK_BYTES)
    return [runs.range(number) for number in range(len(runs))]


def _embeddings(embedded: Sequence[Embedded]) -> dict[str, Any]:
    """What a task's params say of them."""
    return {"embedded": tuple(embedded), "size_bytes": sum(each.size_bytes for each in embedded)}


def read_vectors(store: Store, task: Mapping[str, Any], drops: Sequence[Drops]) -> tuple[Records, NDArray[np.float16]]:
    """([N] facts, [N, D]) of a task's samples that have an embedding and that the steps before have left."""
    files: Sequence[Embedded] = task["embedded"]
    if "paths" in task:
        facts = read_known(store, task["paths"], task["facts_dtype"])
        vectors = np.concatenate([file.read(store)[1] for file in files])
    else:
        facts = read_facts(store, task, drops)
        parts = []
        for file, of_unit in zip(files, of_units(facts, task), strict=True):
            rows, found = file.read(store)
            parts.append(found[np.searchsorted(rows, of_unit["row"])])
        vectors = np.concatenate(parts)
    has = np.isfinite(vectors).all(axis=1)
    return facts[has], vectors[has]


def make_vectors(facts: Records, vectors: NDArray[np.float16]) -> Records:
    """[N] records of `vector_dtype`, without rank and cluster."""
    records = np.zeros(len(facts), vector_dtype(vectors.shape[1]))
    for name in ("uid_high", "uid_low", "unit", "row"):
        records[name] = facts[name]
    records["vector"] = vectors
    return records
