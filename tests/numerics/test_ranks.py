"""One process with the whole batch and two gloo ranks with half of it each compute the same step."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("rank_cases.py")
Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rank_cases", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Every case's results on each of two real processes."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(folder / "rendezvous"), str(folder / f"{rank}.pt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same_step(whole: dict[str, Tensor], parts: list[dict[str, Tensor]]) -> None:
    for part in parts:
        assert part.keys() == whole.keys()
        for name, value in whole.items():
            # float32 sums in another order: a few eps of 1.2e-7 through two encoders; scaled by the largest.
            tolerance = 2e-6 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(part[name], value, rtol=2e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name",
    [
        "clip_global",
        "siglip",
        "siglip_in_three_parts",
        "rils",
        "rils_with_set_c_empty_on_the_last_rank",
        "rils_with_set_c_empty_everywhere",
    ],
)
def test_two_ranks_take_the_step_of_one_process(name: str, cases: ModuleType, two_ranks: list[Results]) -> None:
    whole = cases.CASES[name]()
    assert whole["gradient of towers.log_scale"].abs() > 1e-4
    assert_same_step(whole, [results[name] for results in two_ranks])


def test_reconstruction_moves_the_decoder_only_when_a_picture_is_matched(cases: ModuleType) -> None:
    name = "gradient of decoder.leave.weight"
    assert cases.CASES["rils_with_set_c_empty_on_the_last_rank"]()[name].abs().max() > 1e-4
    assert cases.CASES["rils_with_set_c_empty_everywhere"]()[name].abs().max() == 0


def test_the_local_loss_of_two_ranks_is_another_objective(cases: ModuleType, two_ranks: list[Results]) -> None:
    whole, half = cases.CASES["clip_local"](), two_ranks[0]["clip_local"]
    # Random features: about log(6) among six candidates, about log(3) among three.
    assert whole["contrastive"] - half["contrastive"] > 0.4


def test_the_contrast_turns_global_at_its_step(two_ranks: list[Results]) -> None:
    for results in two_ranks:
        for name, other in (
            ("clip_before_it_turns_global", "clip_local"),
            ("clip_after_it_turned_global", "clip_global"),
        ):
            assert all(torch.equal(value, results[other][key]) for key, value in results[name].items())


def test_parts_change_nothing_on_two_ranks(cases: ModuleType, two_ranks: list[Results]) -> None:
    assert_same_step(cases.CASES["siglip"](), [results["siglip_in_three_parts"] for results in two_ranks])


def test_gathered_rows_get_the_gradient_that_all_ranks_ask(two_ranks: list[Results]) -> None:
    for rank, results in enumerate(two_ranks):
        case = results["gather_backward"]
        assert torch.equal(case["features"], torch.arange(12.0).view(6, 2))
        assert case["offset"].item() == 3 * rank
        rows = torch.arange(6.0)[3 * rank : 3 * rank + 3]
        assert torch.equal(case["gradient"], (10 + 20 + 2 * rows)[:, None].expand(3, 2))


def test_an_uneven_count_is_divided_over_all_ranks(two_ranks: list[Results]) -> None:
    for results in two_ranks:
        case = results["normalise_uneven"]
        assert case["value"].item() == 3.0  # (8 + 4) / (1 + 3)
        assert case["absent"].item() == 0.0
        assert case["gradient"].item() == 0.5  # 2 ranks / 4 terms: averaging over ranks makes it 1 / 4
