"""Captions to token ids: CLIP's byte-pair encoding, with the full vocabulary or only the part that a dataset uses.

Every row is <start of text>, the caption's tokens, <end of text>, then padding with 0. A caption that is too long
loses its last tokens, never its <end of text>; an empty caption is <start of text>, <end of text>. Text is lowercased
and runs of white space count as one; nothing in a caption can produce a special token.

Shapes: B captions, L context length.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

import instant_clip_tokenizer
import numpy as np
import torch
from torch import Tensor

FULL_VOCABULARY_SIZE = 49_408
PADDING_ID = 0
_COMPACT_UNKNOWN, _COMPACT_START, _COMPACT_END, _COMPACT_FIRST = 1, 2, 3, 4


@cache
def _byte_pair_encoder() -> Any:
    return instant_clip_tokenizer.Tokenizer()


class Tokenizer:
    """Turns captions into ids; carries its vocabulary, so a checkpoint that stores `to_json` can always be used."""

    def __init__(self, *, context_length: int = 77, kept_ids: Sequence[int] | None = None) -> None:
        """context_length: ids per caption, at least 2. kept_ids: CLIP ids of a compact vocabulary; None is all."""
        if context_length < 2:
            raise ValueError(f"context_length={context_length}: needs at least 2: start and end")
        self.context_length = context_length
        self.kept_ids = None if kept_ids is None else sorted(set(kept_ids))
        self._start_id, self._end_id = (_byte_pair_encoder().start_of_text(), _byte_pair_encoder().end_of_text())
        self._lookup = None if self.kept_ids is None else self._compact_lookup(self.kept_ids)

    @classmethod
    def build(
        cls, captions: Iterable[str], *, context_length: int, vocabulary: Literal["full", "compact"]
    ) -> "Tokenizer":
        """Make the tokenizer of a run; `compact` keeps the ids that occur in `captions`, in any order of them."""
        if vocabulary == "full":
            return cls(context_length=context_length)
        encoder = _byte_pair_encoder()
        kept: set[int] = set()
        for caption in captions:
            kept.update(encoder.encode(caption))
        return cls(context_length=context_length, kept_ids=sorted(kept))

    @property
    def vocabulary_size(self) -> int:
        """Number of distinct ids, special ones and padding included."""
        return FULL_VOCABULARY_SIZE if self.kept_ids is None else _COMPACT_FIRST + len(self.kept_ids)

    @property
    def end_of_text_id(self) -> int:
        """The id that ends every caption; it occurs nowhere else in a row."""
        return self._end_id if self.kept_ids is None else _COMPACT_END

    @property
    def first_known_id(self) -> int:
        """The least id that stands for a single one of CLIP's: those below are padding and "unknown"."""
        return 0 if self.kept_ids is None else _COMPACT_START

    def ids_of_all(self) -> Tensor:
        """Return int64 [49,408]: what each of CLIP's ids becomes here."""
        return torch.arange(FULL_VOCABULARY_SIZE) if self._lookup is None else torch.from_numpy(self._lookup)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 [B, L], L = context_length."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        ids_BL = _byte_pair_encoder().tokenize_batch(list(captions), context_length=self.context_length)
        if self._lookup is None:
            return torch.from_numpy(ids_BL.astype(np.int64))
        compact_BL = self._lookup[ids_BL]
        ended_BL = np.cumsum(ids_BL == self._end_id, axis=1) > 0
        compact_BL[ended_BL & (ids_BL != self._end_id)] = PADDING_ID
        return torch.from_numpy(compact_BL)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of one row of ids up to its <end of text>; an unknown word is `?`.

        Spaces stand where the encoding knows of them, so punctuation is set apart.
        """
        whole: list[int] = []
        for token in ids:
            if token == self.end_of_text_id:
                break
            whole.extend(self._full_ids(token))
        text: str = _byte_pair_encoder().decode(whole)
        return text.strip()

    def _full_ids(self, token: int) -> list[int]:
        """The token in the full vocabulary, none for start and padding."""
        if self.kept_ids is None:
            return [] if token == self._start_id else [token]  # padding's 0 is `!` where it stands before the end
        if token >= _COMPACT_FIRST:
            return [self.kept_ids[token - _COMPACT_FIRST]]
        return list(_byte_pair_encoder().encode("?")) if token == _COMPACT_UNKNOWN else []

    def is_cut(self, captions: Sequence[str]) -> Tensor:
        """Return bool [B]: which captions are too long for the context, and lose their last tokens."""
        if not captions:
            return torch.zeros(0, dtype=torch.bool)
        longer_BL = _byte_pair_encoder().tokenize_batch(list(captions), context_length=self.context_length + 1)
        return torch.from_numpy(longer_BL[:, self.context_length] == self._end_id)

    def to_json(self) -> str:
        """Serialise; `from_json` gives an equal tokenizer."""
        return json.dumps({"encoding": "clip_bpe", "context_length": self.context_length, "kept_ids": self.kept_ids})

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Read what `to_json` wrote; ValueError when it is something else."""
        stored = json.loads(text)
        if not isinstance(stored, dict) or stored.get("encoding") != "clip_bpe":
            raise ValueError("not a stored tokenizer: its encoding is not clip_bpe")
        return cls(context_length=stored["context_length"], kept_ids=stored["kept_ids"])

    def _compact_lookup(self, kept_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        lookup = np.full(FULL_VOCABULARY_SIZE, _COMPACT_UNKNOWN, dtype=np.int64)
        lookup[list(kept_ids)] = np.arange(_COMPACT_FIRST, _COMPACT_FIRST + len(kept_ids))
        lookup[self._start_id], lookup[self._end_id] = _COMPACT_START, _COMPACT_END
        return lookup
