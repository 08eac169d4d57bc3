"""Step near: of all samples that look the same one is kept, found by perceptual hashes over the whole dataset.

An image has two hashes, its own and its mirror image's. Two images are near when a hash of the one differs from a hash
of the other in at most `dedup.near_distance` bits; what is connected by such pairs is one component, of which the best
by `dedup.prefer` is kept. So a chain of near pairs is one component: the score of a drop says how far it is from the
sample that represents it. Every pair of the dataset is looked at (`pipeline.duplicates.hamming`).

    near-keys     a group    -> the best image of every hash (`KEY`, with the two hashes as the key), the other ones as
                                repeats, and where to look for near hashes (`POINT`)
    near-links    a range of the values of a block of bits -> edges that connect what is near
    near-join     (or rounds of near-large, near-small) -> components, see `pipeline.duplicates.components`
    near-members  a range of hashes -> the images of components, brought to where their component is
    near-drops    a range of components -> `DROP`
    near-units    a group

Nodes of the graph are images' own hashes: images with the same hash are one node, however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, read_buckets, write_buckets, write_in_buckets
from pipeline.config import preferences
from pipeline.curation.context import Context, Curated
from pipeline.duplicates.components import EDGE, components, labels, lookup, mixed, part_of, write_edges
from pipeline.duplicates.config import Preference
from pipeline.duplicates.exchange import (
    GroupStage,
    facts_tasks,
    finish,
    make_drops,
    num_partitions,
    paths_of,
    read_facts,
    write_drops,
)
from pipeline.duplicates.facts import HAS_LOOK
from pipeline.duplicates.hamming import BLOCKS, block_of, linked
from pipeline.duplicates.keys import KEY, find_places, known_tasks, make_keys, partition_of, ranks, read_known
from pipeline.manifest import Shard
from pipeline.reasons import Reason
from pipeline.selection import KNOWN, Drops, Groups

POINT = np.dtype([("hash", "<u8"), ("node", "<u8")])
"""A hash of an image, and the image's own hash."""
MEMBER = np.dtype([*KEY.descr, ("phash", "<u8"), ("phash_mirror", "<u8")])
"""The best image of a hash: key_high is the component, key_low a permutation of its bits."""
MIN_BITS = 16
BYTES_PER_POINT = 160
"""Memory of the search for near hashes."""
MAX_RANGES = 1 << min(count for _, count in BLOCKS)


def drop_near(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: of what looks the same one sample stays."""
    dedup = context.config.dedup
    if dedup.near_distance is None:
        return None
    parts = num_partitions(context.num_known + sum(curated.num_kept))
    look = Look(distance=dedup.near_distance, mirror=dedup.mirror, prefer=preferences(context.config), parts=parts)
    keys = context.run_stage(
        KeysStage(
            store=context.store,
            tasks=facts_tasks(curated),
            drops=curated.drops,
            look=look,
            name=context.name("near-keys"),
        )
    )
    sources = [keys]
    if context.known:
        known = KnownKeysStage(
            store=context.store,
            shards=context.known,
            facts_dtype=curated.facts_dtype,
            look=look,
            name=context.name("near-known"),
        )
        sources.insert(0, context.run_stage(known))
    points, images = (tuple(path for s in sources for path in paths_of(s, f)) for f in ("points.bin", "keys.bin"))
    links = context.run_stage(
        LinksStage(
            store=context.store,
            points=points,
            look=look,
            num_points=sum(marker.counts["largest_place"] for source in sources for marker in source.values()),
            name=context.name("near-links"),
        )
    )
    found = components(context, links, parts, "near")
    members = context.run_stage(
        MembersStage(store=context.store, images=images, labels=found, look=look, name=context.name("near-members"))
    )
    drops = context.run_stage(
        DropsStage(
            store=context.store,
            members=paths_of(members, "members.bin"),
            look=look,
            groups=curated.groups,
            name=context.name("near-drops"),
        )
    )
    return finish(
        context,
        curated,
        paths_of(drops, "drops.bin"),
        name="near",
        rule="dedup.near_distance",
        reason=Reason.NEAR_DUPLICATE,
        repeats=paths_of(keys, "repeats.bin"),
        threshold=dedup.near_distance,
    )


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is looked for, and in how many parts."""

    distance: int
    mirror: bool
    prefer: tuple[Preference, ...]
    parts: int

    @property
    def ranges(self) -> int:
        """How many ranges the values of a block are cut into."""
        return min(self.parts, MAX_RANGES)

    @property
    def num_places(self) -> int:
        """A hash goes to a range of each of the first distance + 1 blocks."""
        return (self.distance + 1) * self.ranges

    def range_of(self, hashes: NDArray[np.uint64], block: int) -> NDArray[np.uint16]:
        """[N] the place of each hash, by its bits in a block."""
        values = np.arange(1 << BLOCKS[block][1], dtype=np.uint64)
        places: NDArray[np.uint16] = (block * self.ranges + partition_of(mixed(values), self.ranges)).astype(np.uint16)
        return places[block_of(hashes, block).astype(np.intp)]


def is_telling(facts: Records) -> NDArray[np.bool_]:
    """[N] whose hash says something of the image.

    Half of a hash's bits are set, but for images with fewer than 32 shades of frequencies: flat ones with a speck,
    which have next to nothing in common.
    """
    has_look = (facts["flags"] & HAS_LOOK) != 0
    telling: NDArray[np.bool_] = has_look & (np.bitwise_count(facts["phash"]) >= MIN_BITS)
    return telling


def write_looks(output: UnitOutput, facts: Records, rank: NDArray[np.uint64], look: Look) -> None:
    """Outputs of a keys stage. Counts rows, without_hash, flat, largest_place (the most points of a place).

    keys.bin      `KEY` of the best image of each hash: (phash, phash_mirror); a bucket per part of the nodes
    repeats.bin   `DROP` of the others, one bucket
    points.bin    `POINT`, a bucket for each place where near hashes meet
    """
    telling = is_telling(facts)
    without = int(((facts["flags"] & HAS_LOOK) == 0).sum())
    output.count("rows", len(facts))
    output.count("without_hash", without)
    output.count("flat", len(facts) - without - int(telling.sum()))
    facts, rank = facts.take(np.flatnonzero(telling)), rank[telling]
    keys = make_keys(facts, facts["phash"], mixed(facts["phash"]), rank)
    dropped, representatives = find_places(keys)
    repeats = make_drops(keys.take(dropped), keys.take(representatives), 0.0)
    write_buckets(output.path("repeats.bin"), repeats, np.zeros(len(repeats), np.int64), 1)
    keys["key_low"] = facts["phash_mirror"]
    is_best = np.ones(len(keys), bool)
    is_best[dropped] = False
    best = keys.take(np.flatnonzero(is_best))
    write_in_buckets(output.path("keys.bin"), best, part_of(best["key_high"], look.parts), look.parts)
    has_other_mirror = keys["key_low"][dropped] != keys["key_low"][representatives]
    output.count("largest_place", _write_points(output, best, keys.take(dropped[has_other_mirror]), look))


def _write_points(output: UnitOutput, best: Records, others: Records, look: Look) -> int:
    """Every hash of every image; of `others`, repeats with a mirror image's hash of their own, only this one.

    Returns how many the place with the most of them gets.
    """
    nodes, hashes = [best["key_high"]], [best["key_high"]]
    if look.mirror:
        nodes += [best["key_high"], others["key_high"]]
        hashes += [best["key_low"], others["key_low"]]
    points = np.empty(sum(map(len, nodes)), POINT)
    joined = np.concatenate(hashes)
    points["hash"], points["node"] = joined, np.concatenate(nodes)
    parts, places = [], []
    for block in range(look.distance + 1):
        place = look.range_of(joined, block)
        order = np.argsort(place, kind="stable")  # by radix
        parts.append(points.take(order))
        places.append(place[order])
    ordered = np.concatenate(places)
    write_buckets(output.path("points.bin"), np.concatenate(parts), ordered, look.num_places)
    return int(np.bincount(ordered).max(initial=0))


@dataclass(frozen=True, kw_only=True)
class KeysStage(GroupStage):
    """A unit is a group of fetch units: images that the steps before have left."""

    look: Look
    memory_bytes: int = 1024 * 2**20

    def run(self, unit: Unit, output: UnitOutput) -> None:
        facts = read_facts(self.store, unit.params, self.drops)
        write_looks(output, facts, ranks(facts, self.look.prefer), self.look)


@dataclass(frozen=True, kw_only=True)
class KnownKeysStage:
    """A unit is some shards, whose samples stay whatever comes: their rank is the best there is."""

    store: Store
    shards: tuple[Shard, ...]
    facts_dtype: np.dtype[Any]
    look: Look
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": ()}

    def units(self) -> Sequence[Unit]:
        return known_tasks(self.shards)

    def run(self, unit: Unit, output: UnitOutput) -> None:
        facts = read_known(self.store, unit.params["paths"], self.facts_dtype)
        write_looks(output, facts, np.zeros(len(facts), np.uint64), self.look)


@dataclass(frozen=True, kw_only=True)
class LinksStage:
    """A unit is a range of the values of a block: `edges.bin` that connect what is near there.

    num_points: no place has more. Hashes of images are uneven: a value of a block may have ten times its share.
    """

    store: Store
    points: tuple[str, ...]
    look: Look
    num_points: int
    name: str
    num_cpus: float = 1.0

    @property
    def memory_bytes(self) -> int:
        return 256 * 2**20 + self.num_points * BYTES_PER_POINT

    def units(self) -> Sequence[Unit]:
        return [
            Unit(id=f"{place:05}", params={"place": place, "block": place // self.look.ranges})
            for place in range(self.look.num_places)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        look, block = self.look, unit.params["block"]
        points = read_buckets(self.store, self.points, unit.params["place"], look.num_places, POINT)
        edges = find_links(points, look.distance, block)
        write_edges(output, edges["node"], edges["neighbour"], look.parts)
        output.count("points", len(points))


def find_links(points: Records, distance: int, block: int) -> Records:
    """Edges, node > neighbour, that connect the nodes of hashes that are the same, or near and meet in this block."""
    if not len(points):
        return np.empty(0, EDGE)
    hashes = np.ascontiguousarray(points["hash"])
    order = np.argsort(hashes)
    ordered, nodes = hashes[order], points["node"][order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = np.flatnonzero(is_first)
    smallest = np.minimum.reduceat(nodes, first)
    ends = [(smallest, smallest[linked(ordered[first], distance, block)])]
    if block == 0:  # the others have the same points
        ends.append((nodes, smallest[np.cumsum(is_first) - 1]))
    found = []
    for left, right in ends:
        is_edge = left != right
        edges = np.empty(int(is_edge.sum()), EDGE)
        edges["node"] = np.maximum(left[is_edge], right[is_edge])
        edges["neighbour"] = np.minimum(left[is_edge], right[is_edge])
        found.append(edges)
    return np.unique(np.concatenate(found))


@dataclass(frozen=True, kw_only=True)
class MembersStage:
    """A unit is a part of the hashes: `members.bin` of `MEMBER`, the images of components, by part of the component."""

    store: Store
    images: tuple[str, ...]
    labels: tuple[str, ...]
    look: Look
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{part:05}", params={"part": part}) for part in range(self.look.parts)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        part, parts = unit.params["part"], self.look.parts
        images = read_buckets(self.store, self.images, part, parts, KEY)
        known = labels(read_buckets(self.store, self.labels, part, parts, EDGE))
        is_linked, component = lookup(images["key_high"], known)
        wanted = is_linked | _is_repeated(images["key_high"])
        images, component = images.take(np.flatnonzero(wanted)), component[wanted]
        members = np.empty(len(images), MEMBER)
        for name in KEY.names or ():
            members[name] = images[name]
        members["phash"], members["phash_mirror"] = images["key_high"], images["key_low"]
        members["key_high"], members["key_low"] = component, mixed(component)
        write_in_buckets(output.path("members.bin"), members, part_of(component, parts), parts)
        output.count("members", len(members))


def _is_repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """[N] which values occur more than once."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return lookup(hashes, (repeated, repeated))[0]


@dataclass(frozen=True, kw_only=True)
class DropsStage:
    """A unit is a part of the components: `drops.bin` of `DROP`, a bucket per group."""

    store: Store
    members: tuple[str, ...]
    look: Look
    groups: Groups
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{part:05}", params={"part": part}) for part in range(self.look.parts)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        members = read_buckets(self.store, self.members, unit.params["part"], self.look.parts, MEMBER)
        dropped, representatives = find_places(members)
        is_new = members["unit"][dropped] != KNOWN
        left, right = members.take(dropped[is_new]), members.take(representatives[is_new])
        drops = make_drops(left, right, distances(left, right, self.look.mirror))
        write_drops(output.path("drops.bin"), drops, self.groups)
        output.count("dropped", len(drops))


def distances(images: Records, representatives: Records, mirror: bool) -> NDArray[np.uint8]:
    """[N] in how many bits an image's hash differs from its representative's, or from that of its mirror image."""
    found: NDArray[np.uint8] = np.bitwise_count(images["phash"] ^ representatives["phash"])
    if mirror:
        found = np.minimum(found, np.bitwise_count(images["phash"] ^ representatives["phash_mirror"]))
    return found
