"""Which sample stands at which position: a pure function of (seed, epoch, position), jumped to in O(1).

Guarantee: every epoch visits every sample once; the batch of a step holds the same samples in the same order whatever
the number of ranks or workers and however often the run was restarted. Nothing is stored, so resuming is arithmetic.

Requirements on the order, and how they are met:
- It reads well from object stores. Rows are visited in blocks of `BLOCK_SIZE` neighbours; the blocks are permuted, and
  samples are permuted inside windows of `WINDOW_BLOCKS` consecutive blocks. The samples of one batch thus lie in few
  stretches of the shards. (Rows are already in random order: the build shuffles them before anything is fetched.)
- A rank reads few of those stretches. A global batch is sorted by row before it is cut into ranks' slices, so with R
  ranks each reads about 1/R of a window's blocks. The batch as a set does not depend on R.
- It is a permutation without a table. Blocks and windows are permuted by a four-round Feistel network on the next
  power of four, walked until the value falls into range (Black and Rogaway, CT-RSA 2002): under 4 rounds on average.
- The last, shorter block must not always hold the same rows: rows are rotated by a random amount each epoch.

Legend: P positions, B samples of a global batch. All arithmetic is uint64 modulo 2**64 or int64.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

BLOCK_SIZE = 256
WINDOW_BLOCKS = 256
_FEISTEL_ROUNDS = 4


def sample_at(
    seed: int,
    epoch: int,
    positions_P: Ints,
    num_samples: int,
    *,
    block_size: int = BLOCK_SIZE,
    window_blocks: int = WINDOW_BLOCKS,
) -> Ints:
    """Return the rows [P] that epoch `epoch` visits at `positions_P`, each in 0 .. num_samples - 1."""
    positions_P = np.asarray(positions_P, dtype=np.int64)
    shuffled_P = _shuffle_in_windows(seed, epoch, positions_P, num_samples, block_size * window_blocks)
    num_full_blocks = num_samples // block_size
    # Places in the visiting order that lie in full blocks; the short block, if there is one, comes last.
    in_full_P = shuffled_P < num_full_blocks * block_size
    rows_P = shuffled_P.copy()
    visited_F = shuffled_P[in_full_P] // block_size  # [F]: which block of the visiting order
    blocks_F = permute(visited_F, num_full_blocks, _key(seed, epoch, 0, 0))  # [F]: where that block lies
    rows_P[in_full_P] = blocks_F * block_size + shuffled_P[in_full_P] % block_size
    rotation = _key(seed, epoch, 1, 0) % num_samples
    return (rows_P + rotation) % num_samples


def batch_at(seed: int, step: int, batch_size: int, num_samples: int) -> tuple[Ints, Ints]:
    """Return (rows [B], epochs [B]) of the global batch of a step, sorted by (epoch, row).

    Step s holds positions s*B .. (s+1)*B - 1 of the endless sequence epoch 0, epoch 1, ...; a batch may span epochs.
    """
    positions_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs_B = positions_B // num_samples
    rows_B = np.empty_like(positions_B)
    for epoch in np.unique(epochs_B):
        here_B = epochs_B == epoch
        rows_B[here_B] = np.sort(sample_at(seed, int(epoch), positions_B[here_B] % num_samples, num_samples))
    return rows_B, epochs_B


def rank_slice(batch_size: int, rank: int, num_ranks: int) -> slice:
    """The part of a global batch that a rank works on; batch_size is divisible by num_ranks."""
    share = batch_size // num_ranks
    return slice(rank * share, (rank + 1) * share)


def permute(values_P: Ints, size: int, key: int) -> Ints:
    """Apply the permutation of 0 .. size - 1 that `key` names to each of values_P."""
    if size <= 1:
        return values_P.copy()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    permuted_P = values_P.astype(np.uint64)
    pending = np.arange(len(permuted_P))  # indices whose value has not fallen into range yet
    while len(pending):
        permuted_P[pending] = _feistel(permuted_P[pending], half_bits, key)
        pending = pending[permuted_P[pending] >= np.uint64(size)]
    return permuted_P.astype(np.int64)


def _shuffle_in_windows(seed: int, epoch: int, positions_P: Ints, num_samples: int, window_size: int) -> Ints:
    """Permute positions inside their windows; the last window may be shorter."""
    shuffled_P = np.empty_like(positions_P)
    windows_P = positions_P // window_size
    for window in np.unique(windows_P):
        here_P = windows_P == window
        first = int(window) * window_size
        size = min(window_size, num_samples - first)
        shuffled_P[here_P] = first + permute(positions_P[here_P] - first, size, _key(seed, epoch, 2, int(window)))
    return shuffled_P


def _feistel(values_P: Words, half_bits: int, key: int) -> Words:
    """A bijection on 2 * half_bits bits."""
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left_P, right_P = values_P >> shift, values_P & mask
    for number in range(_FEISTEL_ROUNDS):
        round_key = np.uint64(_mix_int(key + number))
        left_P, right_P = right_P, left_P ^ (_mix(right_P ^ round_key) & mask)
    return (left_P << shift) | right_P


def _key(seed: int, epoch: int, stream: int, index: int) -> int:
    key = 0
    for part in (seed, epoch, stream, index):
        key = _mix_int(key ^ (part & (1 << 64) - 1))
    return key


def _mix_int(value: int) -> int:
    return int(_mix(np.array([value & (1 << 64) - 1], dtype=np.uint64))[0])


def _mix(words: NDArray[Any]) -> Words:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection on 64 bits that mixes all of them."""
    x = words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
