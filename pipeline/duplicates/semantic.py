"""Step semantic: of images that show the same as a model sees it one stays (SemDeDup: Abbas et al. 2023).

embed-<model>       pipeline.models.stages; known-embed-<model> for the shards of `Context.known`
semantic-sample     some fetch units, or known shards: sample.bin, records (pipeline.duplicates.vectors) of a share of
                    their samples, drawn by uid
semantic-clusters   once: centres.npy, float32 [K, D] (pipeline.duplicates.clusters)
semantic-keys       the same units: keys.bin, records of all their samples, a bucket per partition of clusters
semantic-pairs      a partition: scores.bin, a `DROP` for *every* sample with its greatest cosine to a preferred one
                    (pipeline.duplicates.cosines), a bucket per group; counts rows, alone (nothing to compare with), and
                    above:0.80 to above:0.99: how many each threshold would drop
semantic-units      a group: those above the threshold, a bucket per fetch unit: the step's drops

Another threshold runs the last stage only. A representative may be dropped itself, for a sample that is preferred to
it. Samples without an embedding stay. Where embeddings go through a stage, each is 2 D bytes and 40 more.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import Journal, UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, read_bucket, read_buckets, write_buckets, write_in_buckets
from pipeline.config import preferences
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.clusters import assign, make_clusters, num_clusters
from pipeline.duplicates.config import Preference
from pipeline.duplicates.cosines import exact_cosines, nearest_preferred
from pipeline.duplicates.exchange import (
    GroupStage,
    make_drops,
    paths_of,
    write_drops,
    write_unit_drops,
)
from pipeline.duplicates.keys import ranks
from pipeline.duplicates.vectors import (
    TASK_BYTES,
    known_tasks_of,
    make_vectors,
    num_tasks,
    read_vectors,
    tasks_of,
    vector_dtype,
)
from pipeline.generations import stage_name
from pipeline.identity import chances
from pipeline.models.chosen import Models
from pipeline.models.config import ModelsConfig
from pipeline.models.measure import embed, embed_known
from pipeline.models.stages import UnitImages
from pipeline.reasons import Reason
from pipeline.selection import DROP, KNOWN, NONE, Drops, Groups
from pipeline.workfile import WorkFile

SWEEP = tuple(round(0.80 + 0.01 * step, 2) for step in range(20))
"""Thresholds whose drops are counted."""
BASE_BYTES = 512 * 2**20
SAMPLING = np.uint64(0x5EDA)
"""What the draws of this step are keyed by beside uid and seed."""
Keep = Literal["prefer", "far", "near"]


def drop_semantic(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: of images that are more alike than the threshold one stays."""
    dedup, model = context.config.dedup, Models.of(context.config).embedding
    if model is None:
        return None
    inputs = tuple(UnitImages(id=unit.id, rows=unit.rows, images=unit.images) for unit in curated.units)
    embedded = embed(context, inputs, model)
    if not embedded:
        return None
    tasks, size_bytes = tasks_of(curated, embedded), sum(each.size_bytes for each in embedded)
    if context.known:
        known = embed_known(context, model)
        tasks = (*known_tasks_of(context, known), *tasks)
        size_bytes += sum(each.size_bytes for each in known)
    num_rows = context.num_known + sum(curated.num_kept)
    count = num_clusters(num_rows, dedup.semantic_clusters)
    common: dict[str, Any] = {
        "store": context.store,
        "tasks": tasks,
        "drops": curated.drops,
        "memory_bytes": BASE_BYTES + 5 * max((task.params["size_bytes"] for task in tasks), default=0),
    }
    sampled = context.run_stage(
        SampleStage(
            share=min(1.0, dedup.semantic_sample / max(1, num_rows)),
            seed=context.config.seed,
            name=context.name("semantic-sample"),
            **common,
        )
    )
    dimension = max(marker.counts["dimension"] for marker in sampled.values())
    (clusters,) = context.run_stage(
        ClustersStage(
            store=context.store,
            samples=paths_of(sampled, "sample.bin"),
            dimension=dimension,
            count=count,
            num_rows=num_rows,
            num_sampled=sum(marker.counts["sampled"] for marker in sampled.values()),
            seed=context.config.seed % 2**31,
            config=context.config.models,
            name=context.name("semantic-clusters"),
        )
    ).values()
    parts = min(count, num_tasks(size_bytes))
    keys = context.run_stage(
        KeysStage(
            centres=WorkFile.of(clusters, "centres.npy"),
            prefer=preferences(context.config),
            keep=dedup.semantic_keep,
            parts=parts,
            name=context.name("semantic-keys"),
            **common,
        )
    )
    pairs = context.run_stage(
        PairsStage(
            store=context.store,
            keys=paths_of(keys, "keys.bin"),
            dimension=dimension,
            parts=parts,
            groups=curated.groups,
            name=context.name("semantic-pairs"),
            memory_bytes=BASE_BYTES + 6 * max(TASK_BYTES, size_bytes // parts),
        )
    )
    if dedup.semantic_similarity is None:
        return None
    above = context.run_stage(
        AboveStage(
            store=context.store,
            scores=paths_of(pairs, "scores.bin"),
            groups=curated.groups,
            threshold=dedup.semantic_similarity,
            name=context.name("semantic-units"),
        )
    )
    return Drops(
        rule="dedup.semantic_similarity",
        reason=Reason.SEMANTIC_DUPLICATE,
        paths=paths_of(above, "drops.bin"),
        groups=curated.groups,
        threshold=dedup.semantic_similarity,
    )


def sweep(journal: Journal, generation: int = 0) -> dict[float, int]:
    """{threshold: number of samples that it drops} of a build with a semantic model; empty for others."""
    markers = journal.markers(stage_name(generation, "semantic-pairs")).values()
    return {cut: sum(marker.counts.get(_above(cut), 0) for marker in markers) for cut in SWEEP} if markers else {}


def _above(threshold: float) -> str:
    return f"above:{threshold:.2f}"


@dataclass(frozen=True, kw_only=True)
class SampleStage(GroupStage):
    """A share of the samples, drawn by uid and seed."""

    share: float
    seed: int

    def run(self, unit: Unit, output: UnitOutput) -> None:
        facts, vectors = read_vectors(self.store, unit.params, self.drops)
        uids = np.stack([facts["uid_high"], facts["uid_low"]], axis=1)
        drawn = chances(uids, np.full(len(uids), SAMPLING), self.seed) < self.share
        records = make_vectors(facts[drawn], vectors[drawn])
        write_buckets(output.path("sample.bin"), records, np.zeros(len(records), np.int64), 1)
        output.count("rows", len(facts))
        output.count("sampled", len(records))
        output.count("dimension", vectors.shape[1])


@dataclass(frozen=True, kw_only=True)
class ClustersStage:
    """The clusters, made in one task from all samples in the order of their uids."""

    store: Store
    samples: tuple[str, ...]
    dimension: int
    count: int
    num_rows: int
    num_sampled: int
    seed: int
    config: ModelsConfig
    name: str

    @property
    def num_cpus(self) -> float:
        return self.config.num_cpus

    @property
    def memory_bytes(self) -> int:
        of_sample = vector_dtype(self.dimension).itemsize + 4 * self.dimension  # as stored, and as faiss takes it
        return max(self.config.memory_mib * 2**20, BASE_BYTES + self.num_sampled * of_sample)

    def units(self) -> Sequence[Unit]:
        return [Unit(id="all")]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        points = self.points()
        centres = make_clusters(points, self.count, self.num_rows, seed=self.seed, threads=self.config.threads)
        np.save(output.path("centres.npy"), centres)
        output.count("clusters", len(centres))
        output.count("sampled", len(points))

    def points(self) -> NDArray[np.float32]:
        """[S, D] the sample in the order of uids, of length 1; nothing of that size is held besides the files."""
        dtype = vector_dtype(self.dimension)
        files = self.store.overlapped(lambda path: read_bucket(self.store, path, 0, 1, dtype), self.samples)
        order = np.lexsort(
            tuple(np.concatenate([file[name] for file in files]) for name in ("row", "unit", "uid_low", "uid_high"))
        )
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        points = np.empty((len(order), self.dimension), np.float32)
        for file, of_file in zip(files, np.split(places, np.cumsum([len(file) for file in files])[:-1]), strict=True):
            points[of_file] = file["vector"]
        points /= np.sqrt(np.einsum("nd,nd->n", points, points))[:, None]
        return points


@dataclass(frozen=True, kw_only=True)
class KeysStage(GroupStage):
    """Every sample with its cluster and its place in the order of preference."""

    centres: WorkFile
    prefer: tuple[Preference, ...]
    keep: Keep
    parts: int

    def run(self, unit: Unit, output: UnitOutput) -> None:
        facts, vectors = read_vectors(self.store, unit.params, self.drops)
        centres: NDArray[np.float32] = np.load(io.BytesIO(self.centres.read(self.store)))
        records = make_vectors(facts, vectors)
        cluster = assign(vectors, centres)
        records["cluster"] = cluster
        if "paths" not in unit.params:
            records["rank"] = ranks(facts, self.prefer)
            if self.keep != "prefer":
                records["rank"] = _ranks_by_distance(exact_cosines(vectors, centres[cluster]), self.keep)
        parts = cluster * self.parts // max(1, len(centres))
        write_in_buckets(output.path("keys.bin"), records, parts, self.parts)
        output.count("rows", len(records))


def _ranks_by_distance(cosines: NDArray[np.float32], keep: Keep) -> NDArray[np.uint64]:
    """[N] at least 1; the smallest is the farthest from its centre, or the nearest to it."""
    signed = cosines.astype(np.float64) * (1 if keep == "far" else -1)
    return (np.clip(signed + 1, 0, 2) * 2**30).astype(np.uint64) + np.uint64(1)


@dataclass(frozen=True, kw_only=True)
class PairsStage:
    """The greatest cosine of every sample with a preferred one of its cluster."""

    store: Store
    keys: tuple[str, ...]
    dimension: int
    parts: int
    groups: Groups
    name: str
    memory_bytes: int
    num_cpus: float = 1.0

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{part:05}", params={"part": part}) for part in range(self.parts)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        dtype = vector_dtype(self.dimension)
        records = read_buckets(self.store, self.keys, unit.params["part"], self.parts, dtype)
        order = np.lexsort(tuple(records[name] for name in ("row", "unit", "uid_low", "uid_high", "rank", "cluster")))
        records = records[order]
        edges = np.flatnonzero(np.diff(records["cluster"], prepend=-1, append=-1))
        found = [score_cluster(records[first:end]) for first, end in pairwise(edges.tolist())]
        scored = np.concatenate([np.empty(0, DROP), *found])
        write_drops(output.path("scores.bin"), scored, self.groups)
        output.count("rows", len(scored))
        output.count("alone", int(np.isnan(scored["score"]).sum()))
        for cut in SWEEP:
            output.count(_above(cut), int((scored["score"] > cut).sum()))


def score_cluster(records: Records) -> Records:
    """`DROP` of every sample of a cluster that is not a known one. records: in the order of preference."""
    is_known = records["unit"] == KNOWN
    nearest = nearest_preferred(records["vector"], first=int(is_known.sum()))
    scored = make_drops(records, records[nearest.of], nearest.scores)
    alone = nearest.of < 0
    scored["of_unit"][alone] = scored["of_row"][alone] = NONE
    scored["uid_high"][alone] = scored["uid_low"][alone] = 0
    new: Records = scored[~is_known]
    return new


@dataclass(frozen=True, kw_only=True)
class AboveStage:
    """The samples of a group that are above the threshold."""

    store: Store
    scores: tuple[str, ...]
    groups: Groups
    threshold: float
    name: str
    memory_bytes: int = 512 * 2**20
    num_cpus: float = 1.0

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{group:05}", params={"group": group}) for group in range(len(self.groups))]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        group: int = unit.params["group"]
        scored = read_buckets(self.store, self.scores, group, len(self.groups), DROP)
        dropped = scored[scored["score"] > self.threshold]
        write_unit_drops(output.path("drops.bin"), dropped, *self.groups.range(group))
        output.count("dropped", len(dropped))
