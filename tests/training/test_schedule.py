"""Schedules are functions of the applied steps."""

import pytest

from training.schedule import Schedule, cosine_with_warmup


def test_a_weight_is_constant_by_default() -> None:
    assert [Schedule(value=0.5).at(step) for step in (0, 1, 10_000)] == [0.5, 0.5, 0.5]


def test_a_step_changes_at_its_start() -> None:
    schedule = Schedule(value=0.5, initial=0.1, start_step=10)
    assert [schedule.at(step) for step in (0, 9, 10, 11)] == [0.1, 0.1, 0.5, 0.5]


def test_a_ramp_is_a_straight_line_between_its_ends() -> None:
    schedule = Schedule(value=0.5, start_step=100, ramp_steps=50)
    assert [schedule.at(step) for step in (0, 100, 125, 150, 151)] == [0.0, 0.0, 0.25, 0.5, 0.5]


def test_a_weight_can_fall() -> None:
    assert Schedule(value=0.0, initial=1.0, ramp_steps=4).at(1) == 0.75


def test_the_learning_rate_warms_up_peaks_and_ends_at_its_minimum() -> None:
    def rate(step: int) -> float:
        return cosine_with_warmup(step, peak=1.0, minimum=0.1, warmup_steps=4, total_steps=12)

    assert [rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(8) == pytest.approx(0.55)  # half of the cosine: midway between peak and minimum
    assert [rate(12), rate(99)] == pytest.approx([0.1, 0.1])
    assert all(rate(step) >= rate(step + 1) for step in range(4, 20))


def test_the_learning_rate_needs_no_warm_up() -> None:
    assert cosine_with_warmup(0, peak=2.0, minimum=0.0, warmup_steps=0, total_steps=10) == 2.0
