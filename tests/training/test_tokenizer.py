"""Captions become ids that end where they should, with the full vocabulary and with a compact one."""

import pytest
import torch

from training.data.tokenizer import FULL_VOCABULARY_SIZE, PADDING_ID, Tokenizer

CAPTIONS = ["a red cat", "two dogs, one cat!"]


def compact(context_length: int = 12) -> Tokenizer:
    return Tokenizer.build(CAPTIONS, context_length=context_length, vocabulary="compact")


def test_the_full_vocabulary_gives_clips_ids() -> None:
    # 49406 and 49407 are CLIP's markers; 320 is "a", 2368 is "cat" in its published vocabulary.
    ids = Tokenizer(context_length=6)(["A  cat"])
    assert ids.tolist() == [[49406, 320, 2368, 49407, 0, 0]]
    assert ids.dtype == torch.int64
    assert Tokenizer().vocabulary_size == FULL_VOCABULARY_SIZE
    assert Tokenizer()(["x"]).shape == (1, 77)


@pytest.mark.parametrize("tokenizer", [Tokenizer(context_length=5), compact(5)], ids=["full", "compact"])
def test_a_long_caption_keeps_its_end_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["cat " * 50])[0]
    assert ids[-1] == tokenizer.end_of_text_id
    assert (ids == tokenizer.end_of_text_id).sum() == 1


@pytest.mark.parametrize("tokenizer", [Tokenizer(context_length=5), compact(5)], ids=["full", "compact"])
@pytest.mark.parametrize("caption", ["", "   ", "\n\t"])
def test_an_empty_caption_is_start_and_end(tokenizer: Tokenizer, caption: str) -> None:
    ids = tokenizer([caption])[0]
    assert ids[1] == tokenizer.end_of_text_id
    assert ids[2:].tolist() == [PADDING_ID] * 3


@pytest.mark.parametrize("tokenizer", [Tokenizer(context_length=30), compact(30)], ids=["full", "compact"])
def test_no_caption_can_write_a_marker(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["cat <|endoftext|> <|startoftext|> dog"])[0]
    assert (ids == tokenizer.end_of_text_id).sum() == 1
    assert (ids == ids[0]).sum() == 1


def test_a_compact_vocabulary_tells_apart_what_the_captions_use() -> None:
    full, small = Tokenizer(context_length=12)(CAPTIONS), compact()(CAPTIONS)
    assert small.max() < compact().vocabulary_size < 20
    for row in range(2):
        length = int((full[row] == 49407).nonzero()) + 1
        pairs = set(zip(full[row, :length].tolist(), small[row, :length].tolist(), strict=True))
        assert len(pairs) == len({big for big, _ in pairs}) == len({little for _, little in pairs})


def test_a_word_that_the_vocabulary_lacks_is_unknown_and_not_lost() -> None:
    tokenizer = compact()
    known, unknown = tokenizer(["a cat", "a zebra"])
    assert unknown[1] == known[1]
    assert unknown[2] == 1
    assert known[2] != 1


def test_the_compact_vocabulary_does_not_depend_on_the_order_of_captions() -> None:
    other = Tokenizer.build(reversed(CAPTIONS), context_length=12, vocabulary="compact")
    assert other.to_json() == compact().to_json()


@pytest.mark.parametrize("tokenizer", [Tokenizer(context_length=9), compact(9)], ids=["full", "compact"])
def test_a_stored_tokenizer_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    read = Tokenizer.from_json(tokenizer.to_json())
    captions = [*CAPTIONS, "", "a zebra ate!"]
    assert torch.equal(read(captions), tokenizer(captions))
    assert (read.vocabulary_size, read.end_of_text_id) == (tokenizer.vocabulary_size, tokenizer.end_of_text_id)


def test_other_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not a stored tokenizer"):
        Tokenizer.from_json("[]")


def test_no_captions_are_no_rows() -> None:
    assert compact()([]).shape == (0, 12)


def test_a_context_without_room_for_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Tokenizer(context_length=1)


@pytest.mark.parametrize("tokenizer", [Tokenizer(context_length=12), compact()], ids=["full", "compact"])
def test_ids_can_be_read_again(tokenizer: Tokenizer) -> None:
    for caption, row in zip(CAPTIONS, tokenizer(CAPTIONS), strict=True):
        assert tokenizer.decode(row.tolist()).replace(" ", "") == caption.replace(" ", "")
    assert tokenizer.decode(tokenizer([""])[0].tolist()) == ""


def test_an_unknown_word_is_read_as_a_question_mark() -> None:
    tokenizer = compact()
    assert tokenizer.decode(tokenizer(["a zebra"])[0].tolist()).startswith("a ?")


@pytest.mark.parametrize("tokenizer", [Tokenizer(context_length=5), compact(5)], ids=["full", "compact"])
def test_captions_that_do_not_fit_are_told_from_those_that_just_do(tokenizer: Tokenizer) -> None:
    assert tokenizer.is_cut(["cat cat cat", "cat cat cat cat", "", "cat " * 50]).tolist() == [False, True, False, True]
    assert tokenizer.is_cut([]).shape == (0,)
