"""Masked captions hide the right number of words, the same ones in any batch and at any padding."""

import pytest
import torch
from torch import Tensor

from training.models.masking import TextMask, random_text_mask, similarity_mask, similarity_text_mask

LENGTH = 16
END = torch.tensor([15, 9, 5, 2, 1])
"""Where <end of text> stands: 14, 8, 4, 1 and no words."""
IDS = torch.arange(5) * 7919
EPOCH = torch.zeros(5, dtype=torch.int64)


def mask(rows: slice = slice(None), *, length: int = LENGTH, epoch: int = 0) -> TextMask:
    return random_text_mask(0, IDS[rows], EPOCH[rows] + epoch, end_B=END[rows], length=length, ratio=0.75)


def visible(text_mask: TextMask, row: int) -> list[int]:
    return [int(place) for place in text_mask.keep[row][text_mask.seen[row]]]


def hidden(text_mask: TextMask, row: int) -> list[int]:
    return [int(place) for place in text_mask.masked[row][text_mask.counted[row]]]


def test_a_quarter_of_the_words_stays_and_start_and_end_always_do() -> None:
    drawn = mask()
    for row, (end, num_visible_words) in enumerate(zip(END.tolist(), [3, 2, 1, 0, 0], strict=True)):
        assert len(visible(drawn, row)) == 2 + num_visible_words
        assert {0, end} <= set(visible(drawn, row))
        assert sorted(visible(drawn, row) + hidden(drawn, row)) == list(range(end + 1))
        assert visible(drawn, row) == sorted(visible(drawn, row))
        assert hidden(drawn, row) == sorted(hidden(drawn, row))


def test_hidden_words_as_flags_are_those_of_the_indices() -> None:
    drawn = mask()
    flags = drawn.hidden(LENGTH)
    assert flags.shape == (5, LENGTH)
    for row in range(5):
        assert flags[row].nonzero()[:, 0].tolist() == hidden(drawn, row)


def test_a_text_mask_depends_on_neither_the_batch_nor_the_padding() -> None:
    drawn = mask()
    for row in range(5):
        alone = mask(slice(row, row + 1))
        assert hidden(alone, 0) == hidden(drawn, row)
    for row in range(1, 5):  # what fits into ten tokens
        assert hidden(mask(slice(row, row + 1), length=10), 0) == hidden(drawn, row)


def test_text_masks_change_with_the_epoch() -> None:
    assert any(hidden(mask(), row) != hidden(mask(epoch=1), row) for row in range(3))


@pytest.mark.parametrize(("hide", "expected"), [("high", [1, 4]), ("low", [2, 5])])
def test_the_words_at_the_asked_end_of_the_similarity_are_hidden(hide: str, expected: list[int]) -> None:
    # The start, the end and the padding look most alike of all, and least of all: they play no part.
    similarity = torch.tensor([[9.0, 0.8, 0.1, 0.5, 0.9, 0.2, -9.0, 9.0, -9.0]], requires_grad=True)
    drawn = similarity_text_mask(similarity, end_B=torch.tensor([6]), ratio=0.5, hide=hide)
    # Of five words two stay: floor(5 x 0.5); three are hidden.
    assert set(expected) < set(hidden(drawn, 0))
    assert len(hidden(drawn, 0)) == 3
    assert visible(drawn, 0)[0] == 0
    assert visible(drawn, 0)[-1] == 6


@pytest.mark.parametrize(("hide", "expected"), [("high", [[0, 3], [1, 2]]), ("low", [[1, 2], [0, 3]])])
def test_the_patches_at_the_asked_end_of_the_similarity_are_hidden(hide: str, expected: list[list[int]]) -> None:
    similarity = torch.tensor([[0.9, -0.5, 0.1, 0.7], [0.0, 2.0, 1.0, -1.0]])
    drawn = similarity_mask(similarity, ratio=0.5, hide=hide)
    assert drawn.masked.tolist() == expected
    both: Tensor = torch.cat([drawn.keep, drawn.masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(4).expand(2, -1))


def test_rows_without_room_for_words_hide_nothing() -> None:
    drawn = random_text_mask(0, IDS[:1], EPOCH[:1], end_B=torch.tensor([1]), length=2, ratio=0.75)
    assert visible(drawn, 0) == [0, 1]
    assert hidden(drawn, 0) == []
