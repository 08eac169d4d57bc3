"""What the steps that look for duplicates compare of a sample: one record of fixed size, made once, from columns alone.

Hashes are of 128 bits: two different ones of a billion are the same with probability 1.5e-21.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.buckets import Records
from pipeline.config import BuildConfig, preferences

HAS_BYTES, HAS_LOOK, HAS_URL = 1, 2, 4
"""Bits of `flags`: whether the hash of the bytes, the perceptual hashes, and a URL, are known."""
_FIELDS = {
    "unit": "<u4",
    "row": "<u4",
    **{f"{name}_{half}": "<u8" for name in ("uid", "bytes", "url", "caption") for half in ("high", "low")},
    "phash": "<u8",
    "phash_mirror": "<u8",
    "num_chars": "<u8",  # of the caption
    "priority": "<i8",  # of the source, the greatest is preferred
    "flags": "<u8",
}
FACTS = np.dtype([*_FIELDS.items()])  # of words of 8 bytes: numpy copies what is not aligned three times as slowly
_ALWAYS = ("unit", "row", "uid", "flags")


def needed_facts(config: BuildConfig) -> np.dtype[Any]:
    """The fields of FACTS that these settings' steps read: with one step, half of the bytes of all."""
    dedup, prefer = config.dedup, preferences(config)
    wanted = {
        "bytes": dedup.exact or dedup.by_bytes_and_caption,
        "url": dedup.by_url,
        "caption": dedup.by_bytes_and_caption,
        "phash": dedup.near_distance is not None,
        "num_chars": "caption" in prefer,
        "priority": "source" in prefer,
    }
    names = {*_ALWAYS, *(name for name, is_wanted in wanted.items() if is_wanted)}
    fields = [(name, kind) for name, kind in _FIELDS.items() if {name, name.partition("_")[0]} & names]
    return np.dtype(fields)


COLUMNS = ("uid", "url", "caption")
OPTIONAL_COLUMNS = ("sha256", "phash", "phash_mirror", "source")
"""What `facts_of` reads. The optional ones need not be there, nor have a value in every row."""

_NO_HASH = "0" * 32


def facts_of(
    table: pa.Table,
    unit: int,
    rows: Sequence[int] | NDArray[np.integer[Any]],
    priorities: Mapping[str, int],
    dtype: np.dtype[Any] = FACTS,
) -> Records:
    """[N] FACTS, or some fields of them, of a table's rows, which are numbers `rows` of fetch unit number `unit`.

    priorities: of sources by their name in the column `source`; others have 0.
    """
    facts = np.zeros(table.num_rows, dtype)
    facts["unit"], facts["row"] = unit, rows
    facts["uid_high"], facts["uid_low"] = _words(table["uid"])
    names, present = dtype.names or (), table.schema.names
    if "url_high" in names:
        urls = table["url"].to_pylist()
        facts["url_high"], facts["url_low"] = _text_hashes(urls)
        facts["flags"] |= np.where([bool(url) for url in urls], HAS_URL, 0).astype(np.uint64)
    if "caption_high" in names:
        facts["caption_high"], facts["caption_low"] = _text_hashes(table["caption"].to_pylist())
    if "num_chars" in names:
        facts["num_chars"] = pc.fill_null(pc.utf8_length(table["caption"]), 0).to_numpy()
    if "bytes_high" in names and "sha256" in present:
        facts["bytes_high"], facts["bytes_low"] = _words(table["sha256"])
        facts["flags"] |= np.where(table["sha256"].is_valid().to_numpy(), HAS_BYTES, 0).astype(np.uint64)
    if "phash" in names and {"phash", "phash_mirror"} <= {*present}:
        for name in ("phash", "phash_mirror"):
            facts[name] = pc.fill_null(pc.cast(table[name], pa.uint64()), 0).to_numpy()
        is_known = pc.and_(table["phash"].is_valid(), table["phash_mirror"].is_valid())
        facts["flags"] |= np.where(is_known.to_numpy(), HAS_LOOK, 0).astype(np.uint64)
    if "priority" in names and "source" in present:
        facts["priority"] = [priorities.get(name, 0) for name in table["source"].to_pylist()]
    return facts


def _words(column: pa.ChunkedArray) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first 128 bits of hexadecimal numbers, as two words each; 0 for null."""
    texts = pc.utf8_slice_codeunits(pc.fill_null(column, _NO_HASH), 0, 32).to_pylist()
    words = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0], words[:, 1]


def _text_hashes(texts: Sequence[str | None]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """128-bit hashes, as two words each."""
    digests = b"".join(hashlib.blake2b((text or "").encode(), digest_size=16).digest() for text in texts)
    words = np.frombuffer(digests, "<u8").reshape(-1, 2)
    return words[:, 0], words[:, 1]
