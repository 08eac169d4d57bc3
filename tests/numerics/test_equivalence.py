"""Every method x ZeRO stage x ranks x accumulation x activation checkpointing has the gradient of plain autograd.

`make test` goes through a selection in which every two settings meet, `make test-all` through the whole matrix. Each
world of ranks is started once and goes through its cases, so the second case on an engine also shows that nothing of
the first is left.
"""

import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# fp32 sums in another order, through two encoders and, accumulated, in other groups: some eps of 1.2e-7.
TOLERANCE = 2e-5
TIMEOUT_S = {"selection": 240, "whole": 1200}


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parent))
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


equivalence = load("equivalence")
tiny = sys.modules["tiny"]
VARIANTS = tiny.variants()


def cases(*, whole: bool) -> list[Any]:
    """The matrix; else a selection: a method takes its ZeRO stages on one rank and on two by turns, and further
    settings of it take one stage each."""
    found = []
    for (place, variant), stage, ranks in itertools.product(enumerate(VARIANTS), range(4), (1, 2)):
        selected = ranks == 1 + (place + stage) % 2 and ("/" not in variant or stage == place % 4)
        if whole or selected:
            found += [
                equivalence.Case(
                    variant=variant, zero_stage=stage, num_ranks=ranks, accumulation=parts, checkpointing=checkpointing
                )
                for parts, checkpointing in itertools.product((1, 2), (False, True))
            ]
    return found


def run_world(num_ranks: int, cases_file: Path, output: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, equivalence.__file__, str(cases_file), str(output)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def compare(wanted: list[Any], folder: Path, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Go through the cases in worlds of one and of two ranks, side by side."""
    cases_file = folder / "cases.json"
    cases_file.write_text(json.dumps([asdict(case) for case in wanted]))
    outputs = {num_ranks: folder / f"{num_ranks}.json" for num_ranks in (1, 2)}
    processes = [process for n, output in outputs.items() for process in run_world(n, cases_file, output)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return dict(pair for output in outputs.values() for pair in json.loads(output.read_text()))


def check(wanted: list[Any], found: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert found.keys() == {str(case) for case in wanted}
    with capsys.disabled():
        print(f"\nnumerics.max_rel_grad_error: {max(f['error'] for f in found.values()):.3g} ({len(found)} cases)")
    wrong = {case: f"{f['error']:.3g} at {f['where']}" for case, f in found.items() if not f["error"] < TOLERANCE}
    assert not wrong
    for case, f in found.items():
        assert f["loss"] == pytest.approx(f["expected_loss"], rel=1e-6), case


@pytest.mark.timeout(300)
def test_every_method_has_the_gradient_of_one_plain_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = cases(whole=False)
    check(wanted, compare(wanted, tmp_path, TIMEOUT_S["selection"]), capsys)


@pytest.mark.exhaustive
@pytest.mark.timeout(1260)
def test_the_whole_matrix_has_the_gradient_of_one_plain_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = cases(whole=True)
    check(wanted, compare(wanted, tmp_path, TIMEOUT_S["whole"]), capsys)


def test_every_two_settings_meet_in_the_selection() -> None:
    def pairs(of: list[Any]) -> set[Any]:
        methods = [asdict(case) | {"variant": case.variant.partition("/")[0]} for case in of]
        return {pair for method in methods for pair in itertools.combinations(method.items(), 2)}

    assert pairs(cases(whole=False)) == pairs(cases(whole=True))
    assert {case.variant for case in cases(whole=False)} == set(VARIANTS)


def test_the_set_c_of_rils_is_neither_empty_nor_full_in_the_matrix() -> None:
    method = tiny.make_method(tiny.make_config("rils/1"))
    output = method(tiny.make_batch(0, 1))
    assert 0 < output.metrics["batch_accuracy"] < 1
    assert output.losses["reconstruction"] > 0
