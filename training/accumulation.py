"""A step over micro-batches with exactly the gradient of the whole batch, for losses between samples too.

GradCache (Gao et al. 2021), for any method. With S_k(m) the sum of loss k over part m and N_k its count over all parts
and ranks, the objective is sum_k w_k (sum_m S_k(m)) / N_k, where S_k(m) depends on the parameters directly and through
the embeddings E of all samples. The chain rule splits its gradient:

    1  E = embed(every part), without gradient, gathered; the counts N_k follow from it
    2  for every part: losses(part, own, E) with E as leaves; backward gives the direct part and adds up dL/dE
    3  for every part: backward of <embed(part), dL/dE of its rows>

So the activations of one part are held at a time, and the price is one more encoder pass without gradient (two for a
method that keeps the encoder's output as a target). A method without embeddings takes pass 2 alone.

Legend: R rows of this rank, G rows of all samples that meet.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.errors import RunError
from training.losses.distributed import Gathered, LossSum, Scope, all_reduce_sum, divide, gather
from training.methods.base import Method
from training.methods.values import Batch, Embedded, Output, Sums, combine, weighted


class Call(Protocol):
    """Runs work on a batch inside a forward pass of the method's module."""

    def __call__(self, batch: Batch, work: Callable[[Batch], Any], /) -> Any: ...


class Backward(Protocol):
    """Back-propagates a scalar; `last`: it is the step's last call."""

    def __call__(self, loss: Tensor, /, *, last: bool) -> None: ...


def accumulate(method: Method, batch: Batch, num_parts: int, call: Call, backward: Backward) -> Output:
    """Add one step's gradient to the parameters, part by part; collective. Returns values, the loss without graph."""
    parts = batch.split(num_parts)
    cache = _Cache(method, parts, call)
    weights = method.weights(batch.step)
    counts = _total_counts(method, parts, cache, call)
    sums: list[Sums] = []
    for index, part in enumerate(parts):

        def objective(part: Batch, index: int = index) -> Tensor:
            sums.append(method.losses(part, cache.own(index, part), cache.everyone(index)))
            return weighted({name: divide(loss, counts[name]) for name, loss in sums[-1].losses.items()}, weights)

        backward(call(part, objective), last=index == num_parts - 1 and not cache.names)
        sums[-1] = _detached(sums[-1])
    if cache.names:
        asked = cache.gradients()
        for index, part in enumerate(parts):

            def surrogate(part: Batch, index: int = index) -> Tensor:
                shared = method.embed(part).shared
                value = torch.stack([(shared[name] * asked[index][name]).sum() for name in cache.names]).sum()
                if not value.requires_grad:  # and the backward pass that was the step's last is over
                    raise RunError(
                        "train.accumulation: everything that samples share is frozen (init.freeze); set "
                        "train.accumulation=1, as frozen encoders keep no activations"
                    )
                return value

            backward(call(part, surrogate), last=index == num_parts - 1)
    return combine(_added(sums), weights)


class _Cache:
    """Every part's embeddings as leaves: this rank's part by part, and those of everyone in one piece."""

    def __init__(self, method: Method, parts: list[Batch], call: Call) -> None:
        self._method = method
        self._scope: Scope = method.scope(parts[0].step)
        self._size = len(parts[0].captions)
        self._own: list[dict[str, Tensor]] = []
        self._constant: list[dict[str, Tensor]] = []
        self._keeps = False
        for part in parts:
            with torch.no_grad():
                embedded: Embedded = call(part, method.embed)
            self._own.append({name: x.detach().requires_grad_() for name, x in embedded.shared.items()})
            self._constant.append(embedded.constant)
            self._keeps |= bool(embedded.kept)
            del embedded  # what it keeps is large
        self.names = list(self._own[0])
        self._everyone: dict[str, Gathered] = {}
        for name in self.names:
            with torch.no_grad():
                gathered = gather(torch.cat([own[name] for own in self._own]), self._scope)
            leaf_GD = gathered.features.detach().requires_grad_()
            self._everyone[name] = Gathered(features=leaf_GD, offset=gathered.offset)
        for name in self._constant[0]:
            self._everyone[name] = gather(torch.cat([constant[name] for constant in self._constant]), self._scope)

    def own(self, index: int, part: Batch, *, kept: bool = True) -> Embedded:
        """What `embed` returned for a part; `kept` is computed again, and needs to be inside a forward pass."""
        again: dict[str, Tensor] = {}
        if kept and self._keeps:
            with torch.no_grad():
                again = self._method.embed(part).kept
        return Embedded(shared=self._own[index], constant=self._constant[index], kept=again)

    def everyone(self, index: int) -> dict[str, Gathered]:
        """Everyone's, seen from a part."""
        return {
            name: Gathered(features=all_.features, offset=all_.offset + index * self._size)
            for name, all_ in self._everyone.items()
        }

    def gradients(self) -> list[dict[str, Tensor]]:
        """What all losses of all ranks ask of each part's rows; collective."""
        asked: list[dict[str, Tensor]] = [{} for _ in self._own]
        for name in self.names:
            everyone = self._everyone[name]
            asked_GD = _gradient(everyone.features)
            if self._scope == "global":
                asked_GD = all_reduce_sum(asked_GD)
            for index, own in enumerate(self._own):
                first = everyone.offset + index * self._size
                asked[index][name] = _gradient(own[name]) + asked_GD[first : first + self._size]
        return asked


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _total_counts(method: Method, parts: list[Batch], cache: _Cache, call: Call) -> dict[str, Tensor]:
    """Every loss's count over all parts and ranks; collective."""
    runs_losses = type(method).counts is Method.counts
    total: dict[str, Tensor] = {}
    for index, part in enumerate(parts):

        def counts(part: Batch, index: int = index) -> dict[str, Tensor]:
            return method.counts(part, cache.own(index, part, kept=runs_losses), cache.everyone(index))

        with torch.no_grad():
            found: dict[str, Tensor] = call(part, counts)
        for name, count in found.items():
            total[name] = total.get(name, 0) + count.double()
    reduced = all_reduce_sum(torch.stack(list(total.values())))
    return dict(zip(total, reduced, strict=True))


def _detached(sums: Sums) -> Sums:
    def without_graph(terms: Mapping[str, LossSum]) -> dict[str, LossSum]:
        return {name: LossSum(term.sum.detach(), term.count) for name, term in terms.items()}

    return Sums(losses=without_graph(sums.losses), metrics=without_graph(sums.metrics))


def _added(parts: list[Sums]) -> Sums:
    def add(terms: list[dict[str, LossSum]]) -> dict[str, LossSum]:
        return {
            name: LossSum(
                torch.stack([term[name].sum for term in terms]).sum(),
                torch.stack([term[name].count for term in terms]).sum(),
            )
            for name in terms[0]
        }

    return Sums(losses=add([part.losses for part in parts]), metrics=add([part.metrics for part in parts]))
