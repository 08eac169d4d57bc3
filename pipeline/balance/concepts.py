"""Finding concepts in captions: as MetaCLIP does, by their text between spaces.

Punctuation and the ends of a caption count as spaces, so `cat` is found in "Cat, asleep" and not in "category".
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import ahocorasick
import fsspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import RequestError
from pipeline.balance.config import BalanceConfig

_APART = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`"})


def read_concepts(given: Sequence[str], ignore_case: bool) -> list[str]:
    """The concepts of a setting, spaced, each once, in their order. A single name is a file or URL with one a line.

    RequestError when the file cannot be read or nothing is left.
    """
    lines: Iterable[str] = given
    if len(given) == 1:
        try:
            with fsspec.open(given[0], "rb") as file:
                lines = file.read().decode("utf-8-sig").splitlines()
        except (OSError, ValueError, ImportError) as error:
            raise RequestError(
                f"balance.concepts={given[0]}: cannot be read as a UTF-8 file with one concept a line ({error}); give "
                "another file, or a list of two concepts and more"
            ) from None
    concepts = list(dict.fromkeys(concept for line in lines if (concept := spaced(line, ignore_case)).strip()))
    if not concepts:
        raise RequestError(f"balance.concepts={', '.join(given)}: there is no concept; give one a line")
    return concepts


def require_concepts(config: BalanceConfig) -> None:
    """RequestError, before any work, when concepts are asked for and there are none to read."""
    if config.per_concept is not None and config.concepts:
        read_concepts(config.concepts, config.ignore_case)


def spaced(text: str, ignore_case: bool) -> str:
    """A text with single spaces around words and marks, at its ends too: what concepts and captions are compared as."""
    return f" {' '.join((text.lower() if ignore_case else text).translate(_APART).split())} "


class Matcher:
    """Tells which of many concepts a caption has, all at once."""

    def __init__(self, concepts: Sequence[str], ignore_case: bool) -> None:
        self._ignore_case = ignore_case
        self._automaton = ahocorasick.Automaton()
        for index, concept in enumerate(concepts):
            self._automaton.add_word(concept, index)
        self._automaton.make_automaton()

    def find(self, caption: str) -> list[int]:
        """Indices of the concepts in a caption, each once, ascending."""
        return sorted({index for _, index in self._automaton.iter(spaced(caption, self._ignore_case))})


@lru_cache(maxsize=1)
def matcher_of(data: bytes, ignore_case: bool) -> Matcher:
    """The matcher for a file of `read_concepts`' lines; a worker makes it once."""
    return Matcher(data.decode().split("\n"), ignore_case)


def concept_words(concepts: Sequence[str]) -> NDArray[np.uint64]:
    """A random but fixed number for each concept, which does not change when others join the list."""
    digests = b"".join(blake2b(concept.encode(), digest_size=8).digest() for concept in concepts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)
