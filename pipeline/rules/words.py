"""The rule about words that captions must not have."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ahocorasick
import numpy as np
import pyarrow as pa

from pipeline.reasons import Reason
from pipeline.rules import text
from pipeline.rules.base import ScoreRule, Scores
from pipeline.rules.lists import Entries


@dataclass(frozen=True, kw_only=True)
class BlockedWords(ScoreRule):
    """How often the listed words and phrases are in the caption; case and blanks are evened out.

    whole_words: only where no letter or digit stands before or behind.
    """

    threshold: float
    words: Entries
    whole_words: bool
    name = "curate.blocked_words"
    reason = Reason.CAPTION_BLOCKED_WORD
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        # One search in all captions, a line each, finds what a search in each would: no word has a line's end in it.
        lines = text.plain(text.captions(rows)).to_pylist()
        ends = np.cumsum([len(line) + 1 for line in lines])
        joined = "\n".join(lines)
        matches = np.array(list(_automaton(self.words).iter(joined)), np.int64).reshape(-1, 2)
        last, first = matches[:, 0], matches[:, 0] - matches[:, 1] + 1
        if self.whole_words and len(matches):
            points = np.frombuffer(f"\n{joined}\n".encode("utf-32-le"), np.uint32)  # shifted by one
            is_letter = text.alphanumeric()[points]
            is_whole = ~is_letter[first] & ~is_letter[last + 2]
            last = last[is_whole]
        rows_of = np.searchsorted(ends, last, side="right")
        return np.bincount(rows_of, minlength=len(lines)).astype(np.float64)[: len(lines)]


@lru_cache(maxsize=4)
def _automaton(words: Entries) -> Any:
    """Finds all words at once (Aho and Corasick 1975); gives a match's last place and its length."""
    automaton = ahocorasick.Automaton()
    for word in text.plain(pa.array(words.read(), pa.string())).to_pylist():
        automaton.add_word(word, len(word))
    automaton.make_automaton()
    return automaton
