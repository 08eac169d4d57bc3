"""Micro-batches have the gradient of the whole batch, and hold one micro-batch at a time."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import RequestError, RunError
from training.accumulation import accumulate
from training.config import check_parts
from training.engine import checkpoint_activations
from training.methods import Batch, Method
from training.methods.values import Embedded

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))
import tiny


def gradients(method: Method) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    return found


def in_parts(method: Method, num_parts: int) -> dict[str, Tensor]:
    ends: list[bool] = []

    def backward(loss: Tensor, *, last: bool) -> None:
        ends.append(last)
        loss.backward()

    accumulate(method, tiny.make_batch(0, 1), num_parts, method, backward)
    assert ends.index(True) == len(ends) - 1  # the step's last backward pass, and no other, is announced as such
    return gradients(method)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).abs().max() / g.abs().max().clamp(min=1e-6)) for name, g in expected.items())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For products of eight rows a second one only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_parts", [1, 2, 8])
@pytest.mark.parametrize("variant", ["clip", "rils/1"])
def test_parts_have_the_gradient_and_the_values_of_the_whole(variant: str, num_parts: int) -> None:
    method = tiny.make_method(tiny.make_config(variant))
    whole = method(tiny.make_batch(0, 1))
    whole.loss.backward()
    expected = gradients(method)
    output = accumulate(method, tiny.make_batch(0, 1), num_parts, method, lambda loss, last: loss.backward())
    # fp32 sums in another order: some eps of 1.2e-7.
    assert largest_error(gradients(method), expected) < 5e-6
    assert output.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for found, wanted in ((output.losses, whole.losses), (output.metrics, whole.metrics)):
        assert {name: pytest.approx(x.item(), rel=1e-6) for name, x in wanted.items()} == {
            name: x.item() for name, x in found.items()
        }


def test_adding_up_the_losses_of_parts_is_another_gradient() -> None:
    """What accumulation does that knows nothing of the other parts: the reason for the three passes."""
    method = tiny.make_method(tiny.make_config("clip"))
    method(tiny.make_batch(0, 1)).loss.backward()
    expected = gradients(method)
    for part in tiny.make_batch(0, 1).split(2):
        (method(part).loss / 2).backward()
    assert largest_error(gradients(method), expected) > 0.1


def test_the_temperature_gets_its_gradient_once() -> None:
    method = tiny.make_method(tiny.make_config("clip"))
    found = [in_parts(method, num_parts)["towers.log_scale"].item() for num_parts in (1, 2, 4)]
    assert abs(found[0]) > 1e-3
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_default_counts_are_those_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny.make_method(tiny.make_config("rils/1"))
    expected = in_parts(method, 2)
    monkeypatch.setattr(type(method), "counts", Method.counts)
    assert largest_error(in_parts(method, 2), expected) < 1e-6


def test_what_a_part_keeps_is_gone_before_the_next_part_begins() -> None:
    import weakref

    method = tiny.make_method(tiny.make_config("rils"))
    embed, kept = method.embed, []
    most = 0

    def watched(batch: Batch) -> Embedded:
        nonlocal most
        embedded = embed(batch)
        kept.append(weakref.ref(embedded.kept["tokens"]))
        most = max(most, sum(reference() is not None for reference in kept))
        return embedded

    method.embed = watched  # type: ignore[method-assign]
    in_parts(method, 4)
    assert len(kept) == 12  # embedded, kept again for the losses, embedded again with gradient: four parts each
    assert most <= 2  # the one at hand, and the one before it until it is overwritten


def saved_bytes(method: Method, run: Callable[[], Any]) -> int:
    """The most that autograd holds for a backward pass at a time, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    held = most = 0

    class Handle:
        def __init__(self, x: Tensor) -> None:
            nonlocal held, most
            self.x = x
            self.size_bytes = 0 if x.untyped_storage().data_ptr() in own else x.numel() * x.element_size()
            held += self.size_bytes
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size_bytes

    with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.x):
        run()
    method.zero_grad()
    return most


def test_parts_and_recomputation_hold_less_for_the_backward_pass() -> None:
    method = tiny.make_method(tiny.make_config("clip"))
    whole = saved_bytes(method, lambda: method(tiny.make_batch(0, 1)).loss.backward())
    quarter = saved_bytes(method, lambda: in_parts(method, 4))
    checkpoint_activations(method, True)
    recomputed = saved_bytes(method, lambda: method(tiny.make_batch(0, 1)).loss.backward())
    assert quarter < 0.35 * whole
    assert recomputed < 0.5 * whole


def test_local_steps_come_before_the_configured_scope() -> None:
    method = tiny.make_method(tiny.make_config("clip"))
    assert method.scope(0) == "global"
    config = tiny.make_config("clip").clip.model_copy(update={"local_steps": 500})
    method.config = config  # type: ignore[assignment]
    assert [method.scope(step) for step in (0, 499, 500, 10_000)] == ["local", "local", "global", "global"]


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="8 cannot be cut into 3"):
        tiny.make_batch(0, 1).split(3)
    with pytest.raises(RequestError, match=r"train\.accumulation=3: a rank's 4 samples"):
        check_parts(tiny.make_config("clip", accumulation=3), 2)


def test_frozen_encoders_that_leave_nothing_to_accumulate_are_named() -> None:
    method = tiny.make_method(tiny.make_config("clip"))
    method.get_submodule("towers").requires_grad_(False)
    method.get_parameter("towers.log_scale").requires_grad_(True)
    with pytest.raises(RunError, match=r"train.accumulation=1"):
        in_parts(method, 2)
