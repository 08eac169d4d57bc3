"""What the visiting order promises: a permutation an epoch, the same for every number of ranks, reachable at once."""

import numpy as np
import pytest

from training.data.order import batch_at, permute, rank_slice, sample_at

SMALL_BLOCKS = {"block_size": 8, "window_blocks": 4}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_permute_is_a_bijection(size: int) -> None:
    assert sorted(permute(np.arange(size), size, key=7)) == list(range(size))


@pytest.mark.parametrize("num_samples", [1, 5, 8, 32, 33, 63, 64, 1000, 1001])
@pytest.mark.parametrize("epoch", [0, 1])
def test_epoch_visits_every_sample_once(num_samples: int, epoch: int) -> None:
    rows = sample_at(3, epoch, np.arange(num_samples), num_samples, **SMALL_BLOCKS)
    assert sorted(rows) == list(range(num_samples))


def test_default_blocks_and_windows_visit_every_sample_once() -> None:
    num_samples = 150_001  # three windows, the last block short
    assert len(np.unique(sample_at(0, 0, np.arange(num_samples), num_samples))) == num_samples


def test_any_position_is_reached_without_the_ones_before() -> None:
    whole = sample_at(5, 2, np.arange(500), 500, **SMALL_BLOCKS)
    for position in (0, 7, 31, 32, 499):
        assert sample_at(5, 2, np.array([position]), 500, **SMALL_BLOCKS)[0] == whole[position]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = sample_at(1, 0, np.arange(1000), 1000)
    np.testing.assert_array_equal(first, sample_at(1, 0, np.arange(1000), 1000))
    assert np.mean(first == sample_at(1, 1, np.arange(1000), 1000)) < 0.05
    assert np.mean(first == sample_at(2, 0, np.arange(1000), 1000)) < 0.05


def test_order_looks_random_inside_a_window() -> None:
    rows = sample_at(0, 0, np.arange(4096), 4096)
    # The mean distance of two independent uniform rows is a third of the range (standard error 0.4 % of it).
    assert abs(np.mean(np.abs(np.diff(rows))) / 4096 - 1 / 3) < 0.02


def test_window_reads_few_blocks() -> None:
    rows = sample_at(0, 0, np.arange(32), 10_000, **SMALL_BLOCKS)
    assert len({row // 8 for row in (rows - sample_rotation(10_000)) % 10_000}) == 4


def sample_rotation(num_samples: int) -> int:
    """The epoch's rotation, recovered from the order itself: blocks begin at it modulo the block size."""
    rows = np.sort(sample_at(0, 0, np.arange(32), num_samples, **SMALL_BLOCKS))
    starts = [row for row in rows if row - 1 not in rows]
    return int(starts[0] % 8)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_batch_is_the_same_for_every_number_of_ranks(num_ranks: int) -> None:
    rows, epochs = batch_at(9, step=11, batch_size=12, num_samples=50)
    slices = [rank_slice(12, rank, num_ranks) for rank in range(num_ranks)]
    np.testing.assert_array_equal(np.concatenate([rows[part] for part in slices]), rows)
    np.testing.assert_array_equal(np.concatenate([epochs[part] for part in slices]), epochs)


def test_steps_continue_from_epoch_to_epoch() -> None:
    batches = [batch_at(0, step, 12, 50) for step in range(25)]  # 300 positions: six epochs
    seen = [(int(e), int(r)) for rows, epochs in batches for r, e in zip(rows, epochs, strict=True)]
    assert sorted(seen) == [(epoch, row) for epoch in range(6) for row in range(50)]


def test_ranks_of_a_batch_read_separate_stretches() -> None:
    rows, _ = batch_at(0, 0, 512, 100_000)
    halves = [set(rows[rank_slice(512, rank, 2)] // 256) for rank in range(2)]
    assert len(halves[0] & halves[1]) <= 1
