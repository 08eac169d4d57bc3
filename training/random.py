"""Counter-based random draws: the same sample gets the same numbers in every run of one seed.

A draw is a hash of (seed, stream, sample id, epoch, index), so it depends on no state: not on the number of ranks or
workers, not on the batch a sample falls into, not on a restart. Everything is integer arithmetic modulo 2**64 and one
exact conversion, so CPU and GPU agree bit for bit. The hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

Shapes: B samples, n draws of each.
"""

import hashlib

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def bits(seed: int, sample_ids_B: Tensor, epoch_B: Tensor, stream: str, n: int) -> Tensor:
    """Return [B, n] int64 with 64 uniform bits each, on the device of the ids.

    seed: of the run. sample_ids_B, epoch_B: int64 [B]. stream: names what is drawn ("crop", "mask"); streams are
    independent of each other.
    """
    device = sample_ids_B.device
    # Hashed on the host: a tensor made there would cost a copy to the device.
    start = int(_mix(torch.tensor(_signed(seed) ^ _stream_key(stream), dtype=torch.int64)))
    state_B = _mix(_mix(start + sample_ids_B) + epoch_B.to(device))
    index_n = torch.arange(1, n + 1, dtype=torch.int64, device=device) * _signed(_GAMMA)
    return _mix(state_B[:, None] + index_n)


def uniform(
    seed: int, sample_ids_B: Tensor, epoch_B: Tensor, stream: str, n: int, device: torch.device | None = None
) -> Tensor:
    """Return [B, n] float32, uniform on the 2**24 multiples of 2**-24 in [0, 1), on `device` or that of the ids."""
    ids_B = sample_ids_B if device is None else sample_ids_B.to(device)
    top24_Bn = _shift_right(bits(seed, ids_B, epoch_B, stream, n), 40)
    return top24_Bn.to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection on 64 bits whose every output bit depends on every input bit."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, places: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little", signed=True)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
