"""Captions as arrays, so that rules about their text need no loop over rows."""

import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.rules.base import Scores

_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """[N] rows of different length, one after the other. starts: [N + 1] where each begins; the last is the end."""

    values: NDArray[np.uint64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sums(self, flags: NDArray[np.bool_]) -> Scores:
        """[N] how many flags of each row are set; `flags` has one for each value."""
        total = np.concatenate([[0], np.cumsum(flags)])
        sums: Scores = (total[self.starts[1:]] - total[self.starts[:-1]]).astype(np.float64)
        return sums


def captions(rows: pa.Table) -> pa.StringArray:
    """[N] captions without blanks around them, "" where there is none."""
    return pc.utf8_trim_whitespace(pc.fill_null(rows.column("caption").combine_chunks(), ""))


def plain(texts: pa.StringArray) -> pa.StringArray:
    """Texts as they are compared: in lower case, with single blanks between words and none around."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"[\s\p{Z}]+", " "))


def characters(texts: pa.StringArray) -> Ragged:
    """The code points of texts."""
    points = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le"), np.uint32).astype(np.uint64)
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    return Ragged(values=points, starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def words(texts: pa.StringArray) -> Ragged:
    """The words of texts, what stands between blanks: a number for each that differs."""
    lists = pc.utf8_split_whitespace(texts)
    numbers = pc.list_flatten(lists).dictionary_encode().indices.to_numpy().astype(np.uint64)
    is_empty = pc.equal(texts, "").to_numpy(zero_copy_only=False)  # splits into one empty word
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    row_of = np.repeat(np.arange(len(texts)), lengths)
    starts = np.concatenate([[0], np.cumsum(np.where(is_empty, 0, lengths))]).astype(np.int64)
    return Ragged(values=numbers[~is_empty[row_of]], starts=starts)


def repeated_part(rows: Ragged, size: int) -> Scores:
    """[N] the part of each row's n-grams of `size` values that stood in the row before: 1 - distinct / all.

    0 for rows without two n-grams. N-grams are compared by a 64-bit hash less the bits that number the rows.
    """
    num_rows, count = len(rows), len(rows.values) - size + 1
    lengths = np.diff(rows.starts)
    total = np.maximum(lengths - size + 1, 0)
    if count <= 0:
        return np.zeros(num_rows)
    with np.errstate(over="ignore"):
        values, grams = _mixed(rows.values), np.zeros(count, np.uint64)
        for place in range(size):
            grams = grams * _ODD + values[place : place + count]
        grams = _mixed(grams)
    row_of = np.repeat(np.arange(num_rows), lengths)
    row_bits = np.uint64(max(1, (num_rows - 1).bit_length()))
    is_inside = row_of[:count] == row_of[size - 1 :]
    keys = (row_of[:count][is_inside].astype(np.uint64) << (np.uint64(64) - row_bits)) | (grams[is_inside] >> row_bits)
    keys.sort()
    is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    distinct = np.bincount((keys[is_first] >> (np.uint64(64) - row_bits)).astype(np.int64), minlength=num_rows)
    part: Scores = 1 - np.divide(distinct, total, out=np.ones(num_rows), where=total > 0)
    return part


def is_kind(rows: Ragged, kind: Callable[[], NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Which characters are of a kind: `alphanumeric` or `blank`."""
    flags: NDArray[np.bool_] = kind()[rows.values]
    return flags


@cache
def alphanumeric() -> NDArray[np.bool_]:
    """Of each code point, whether it is a letter or a digit of any script, or a mark that belongs to one."""
    return np.array([unicodedata.category(chr(point))[0] in "LMN" for point in range(sys.maxunicode + 1)])


@cache
def blank() -> NDArray[np.bool_]:
    """Of each code point, whether it is white space."""
    return np.array([chr(point).isspace() for point in range(sys.maxunicode + 1)])


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: equal words stay equal, others become unlike."""
    words = (words + _ODD) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed
