"""Connected components of a graph that no machine holds: large-star and small-star in turns until nothing changes.

Kiveris et al. 2014, "Connected components in MapReduce and beyond". Nodes are 64-bit numbers. With m(u) the smallest of
a node u and its neighbours, a large star connects every neighbour of u that is larger than u to m(u), a small star
every other one, and u itself. Both keep what is connected; where neither changes anything, every node is connected to
the smallest of its component and to nothing else. Nodes lie in parts by a hash; an edge is stored in the parts of both
its ends, so that a part has all edges of its nodes side by side.

A graph of up to `MAX_EDGES` is one task's work: what takes most time at small scale is the number of stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.errors import RunError
from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, read_buckets, read_records, write_in_buckets
from pipeline.curation.context import Context
from pipeline.duplicates.exchange import paths_of
from pipeline.duplicates.hamming import merge
from pipeline.duplicates.keys import partition_of

EDGE = np.dtype([("node", "<u8"), ("neighbour", "<u8")])
MAX_EDGES = 4_000_000
MAX_ROUNDS = 100
"""Far more than any graph needs: their number grows with the logarithm of the longest path."""
_ODD = np.uint64(0x9E3779B97F4A7C15)

Nodes = NDArray[np.uint64]


def mixed(nodes: Nodes) -> Nodes:
    """A permutation of 64-bit numbers after which numbers that are alike are far apart."""
    mixed = nodes * _ODD
    return (mixed ^ (mixed >> np.uint64(32))) * _ODD


def part_of(nodes: Nodes, count: int) -> NDArray[np.int64]:
    """[N] the part that each node lies in."""
    return partition_of(mixed(nodes), count)


def write_edges(output: UnitOutput, left: Nodes, right: Nodes, parts: int) -> None:
    """Undirected edges without loops, each once, as `edges.bin`: `EDGE` in both directions, a bucket per part.

    Counts edges.
    """
    edges = np.empty(2 * len(left), EDGE)
    edges["node"] = np.concatenate([left, right])
    edges["neighbour"] = np.concatenate([right, left])
    write_in_buckets(output.path("edges.bin"), edges, part_of(edges["node"], parts), parts)
    output.count("edges", len(left))


def smallest_of_component(edges: Records) -> tuple[Nodes, Nodes]:
    """([N], [N]) every node of a graph, ascending, and the smallest node of its component."""
    nodes = np.unique(np.concatenate([edges["node"], edges["neighbour"]]))
    pair = np.searchsorted(nodes, edges["node"]), np.searchsorted(nodes, edges["neighbour"])
    return nodes, nodes[merge(np.arange(len(nodes)), [pair])]


def large_star(edges: Records) -> tuple[Nodes, Nodes, int]:
    """(left, right, how many are new): the edges that a part's nodes make of all their edges, left > right."""
    node, neighbour, smallest = _with_smallest(edges)
    is_larger = neighbour > node
    left, right = neighbour[is_larger], smallest[is_larger]
    return left, right, int((right != node[is_larger]).sum())


def small_star(edges: Records) -> tuple[Nodes, Nodes, int]:
    """`large_star` of the smaller neighbours alone."""
    node, neighbour, smallest = _with_smallest(edges[edges["neighbour"] < edges["node"]])
    is_other = neighbour != smallest
    left = np.concatenate([neighbour[is_other], node[~is_other]])
    right = np.concatenate([smallest[is_other], smallest[~is_other]])
    return left, right, int(is_other.sum())


def _with_smallest(edges: Records) -> tuple[Nodes, Nodes, Nodes]:
    """Distinct edges as (node, neighbour, the smallest of the node and its neighbours), ordered by node."""
    order = np.lexsort((edges["neighbour"], edges["node"]))
    node, neighbour = edges["node"][order], edges["neighbour"][order]
    is_new = np.ones(len(node), bool)
    is_new[1:] = (node[1:] != node[:-1]) | (neighbour[1:] != neighbour[:-1])
    node, neighbour = node[is_new], neighbour[is_new]
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(node)), bool), node[1:] != node[:-1]]))
    lengths = np.diff(first, append=len(node))
    return node, neighbour, np.repeat(np.minimum(node[first], neighbour[first]), lengths)


def components(context: Context, edges: Mapping[str, Marker], parts: int, name: str) -> tuple[str, ...]:
    """Files of `EDGE`, a bucket per part: every node with an edge, and the smallest of its component or, at that node
    itself, some other one.

    edges: markers of a stage that has called `write_edges`. name: of the step.
    """
    paths = paths_of(edges, "edges.bin")
    if sum(marker.counts["edges"] for marker in edges.values()) <= MAX_EDGES:
        whole = WholeStage(store=context.store, edges=paths, parts=parts, name=context.name(f"{name}-join"))
        return paths_of(context.run_stage(whole), "edges.bin")
    for number in range(1, MAX_ROUNDS + 1):
        num_new = 0
        for star in ("large", "small"):
            stage = StarStage(
                store=context.store,
                edges=paths,
                parts=parts,
                star=star,
                name=context.name(f"{name}-{star}-{number:02}"),
            )
            done = context.run_stage(stage)
            paths = paths_of(done, "edges.bin")
            num_new += sum(marker.counts["new"] for marker in done.values())
        if not num_new:
            return paths
    raise RunError(f"stage {name}: components are not found after {MAX_ROUNDS} rounds")


@dataclass(frozen=True, kw_only=True)
class WholeStage:
    """One unit: all edges at once."""

    store: Store
    edges: tuple[str, ...]
    parts: int
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = MAX_EDGES * EDGE.itemsize * 16

    def units(self) -> Sequence[Unit]:
        return [Unit(id="00000")]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        files = self.store.overlapped(lambda path: read_records(self.store, path, self.parts, EDGE), self.edges)
        edges = np.concatenate(files)
        node, smallest = smallest_of_component(edges[edges["neighbour"] < edges["node"]])
        is_leaf = node != smallest
        write_edges(output, node[is_leaf], smallest[is_leaf], self.parts)


@dataclass(frozen=True, kw_only=True)
class StarStage:
    """A unit is a part of the nodes."""

    store: Store
    edges: tuple[str, ...]
    parts: int
    star: Literal["large", "small"]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{part:05}", params={"part": part}) for part in range(self.parts)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        edges = read_buckets(self.store, self.edges, unit.params["part"], self.parts, EDGE)
        left, right, num_new = (large_star if self.star == "large" else small_star)(edges)
        write_edges(output, left, right, self.parts)
        output.count("new", num_new)


def labels(edges: Records) -> tuple[Nodes, Nodes]:
    """([N], [N]) the nodes of a part of `components`' result, ascending, and the smallest node of their component."""
    nodes, first = np.unique(edges["node"], return_index=True)
    return nodes, np.minimum(nodes, edges["neighbour"][first])


def lookup(nodes: Nodes, known: tuple[Nodes, Nodes]) -> tuple[NDArray[np.bool_], Nodes]:
    """([N] which nodes have a label, [N] the label, or the node itself). known: of `labels`."""
    have: NDArray[Any] = known[0]
    if not len(have):
        return np.zeros(len(nodes), bool), nodes
    at = np.minimum(np.searchsorted(have, nodes), len(have) - 1)
    is_known = have[at] == nodes
    return is_known, np.where(is_known, known[1][at], nodes)
