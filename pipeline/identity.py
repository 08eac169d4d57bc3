"""Who a pair is and where it stands: its uid from its own contents, its place in the dataset from uid and seed."""

from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uid_digest(url: str | None, caption: str) -> bytes:
    """The 16 bytes that identify a pair: BLAKE2b-128 over the URL's length, the URL and the caption."""
    target = b"" if url is None else url.encode()
    return blake2b(b"%d:" % len(target) + target + caption.encode(), digest_size=16).digest()


def uid_keys(urls: pa.StringArray, captions: pa.StringArray) -> Keys:
    """Identities of pairs, uint64 [N, 2] (high, low), comparing like the hex text of `uid_text`."""
    digests = map(uid_digest, urls.to_pylist(), captions.to_pylist())
    return np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)


def uid_text(keys: Keys) -> pa.StringArray:
    """uint64 [N, 2] as 32 hex digits each."""
    text = keys.astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, 32 * len(keys) + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(text))


def keys_of_text(uids: pa.StringArray) -> Keys:
    """The inverse of `uid_text`."""
    joined = "".join(uids.to_pylist())
    return np.frombuffer(bytes.fromhex(joined), ">u8").reshape(-1, 2).astype(np.uint64)


def order_of(keys: Keys, seed: int) -> Keys:
    """Places of pairs in the dataset, uint64 [N], uniform: SplitMix64's finaliser over seed, high and low words.

    Equal for equal pairs; two seeds give unrelated orders.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.full(len(keys), seed, np.uint64) + _GOLDEN)
        for word in (keys[:, 0], keys[:, 1]):
            state = _mix(state ^ word) + _GOLDEN
        places: Keys = _mix(state)
    return places


def chances(keys: Keys, words: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.float64]:
    """Draws, uniform in [0, 1), one for each pair and further word: a pure function of uid, word and seed.

    keys: uint64 [N, 2]. words: uint64 [N].
    """
    with np.errstate(over="ignore"):
        mixed = _mix((order_of(keys, seed) ^ words) + _GOLDEN)
    draws: npt.NDArray[np.float64] = (mixed >> np.uint64(11)) * 2.0**-53
    return draws


def range_bounds(num_ranges: int) -> list[tuple[int, int]]:
    """The 64-bit order cut into equal parts: [first, last] of each, both included."""
    cuts = [index * 2**64 // num_ranges for index in range(num_ranges + 1)]
    return [(first, after - 1) for first, after in pairwise(cuts)]


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
