"""Incremental detokenization equals decoding everything at once, and never shows a part of a character."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.smollm2 import needs_smollm2
from tokenizers import Tokenizer, decoders, models

from biphase.protos.gguf_file import GgufFile
from biphase.protos.model_source import resolve
from biphase.router import gguf_tokenizer, tokenizer
from biphase.router.detokenizer import (
    BYTE_OF,
    SPACE_PIECE,
    Detokenizer,
    TokenBytes,
    byte_level,
    bytes_of_decoder,
    sentencepiece,
)

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
TEXTS = [
    "plain text",
    " leading space",
    "naïve café",
    "你好，世界",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "\n\n\t x  ",
    "مرحبا",
    "\U0001f600" * 5,
]


def byte_table(silent: frozenset[int] = frozenset()) -> TokenBytes:
    """256 tokens of one byte each, then a few longer ones."""
    pieces = [CHARACTER_OF[byte] for byte in range(256)]
    pieces += ["".join(CHARACTER_OF[b] for b in text.encode()) for text in (" the", "é", "好", "<|end|>", "a b")]
    return TokenBytes(piece_of=lambda i: pieces[i] if i < len(pieces) else None, to_bytes=byte_level, silent=silent)


def piece_library(strip: int) -> Tokenizer:
    """The library's own decoding of SentencePiece tokens with byte fallback."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [
        f"{SPACE_PIECE}the",
        SPACE_PIECE,
        "re",
        "é",
        f"{SPACE_PIECE * 3}",
    ]
    library = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", strip, 0)] if strip else steps)
    return library


def table_of(library: Tokenizer) -> TokenBytes:
    decoding = bytes_of_decoder(json.loads(library.decoder.__getstate__()))
    assert decoding is not None
    to_bytes, strip_left = decoding
    return TokenBytes(piece_of=library.id_to_token, to_bytes=to_bytes, silent=frozenset(), strip_left=strip_left)


@pytest.fixture(scope="module")
def smollm2() -> tuple[tokenizer.Tokenizer, Tokenizer]:
    """Ours, and the library's tokenizer of the same file, whose ``decode`` is the truth."""
    return tokenizer.Tokenizer.load("smollm2"), gguf_tokenizer.build(GgufFile(resolve("smollm2").path))


@given(st.lists(st.lists(st.integers(0, 262), max_size=5), max_size=30))
def test_any_split_of_any_tokens_gives_the_same_text(groups: list[list[int]]) -> None:
    table = byte_table(silent=frozenset({259}))
    whole = b"".join(table[token] for group in groups for token in group).decode("utf-8", errors="replace")
    detokenizer = Detokenizer(table)
    assert "".join([*(detokenizer.push(group) for group in groups), detokenizer.flush()]) == whole


@given(st.text(max_size=40))
def test_valid_text_shows_whole_characters_only(text: str) -> None:
    detokenizer = Detokenizer(byte_table())
    shown = ""
    for byte in text.encode():
        shown += detokenizer.push([byte])
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.flush() == ""


def test_a_cut_character_is_held_back_and_replaced_at_the_end() -> None:
    detokenizer = Detokenizer(byte_table())
    first, *_ = "😀".encode()
    assert detokenizer.push([ord("a"), first]) == "a"
    assert detokenizer.flush() == "�"


def test_invalid_bytes_are_replaced_as_soon_as_nothing_can_save_them() -> None:
    detokenizer = Detokenizer(byte_table())
    assert detokenizer.push([0xFF, ord("x"), 0xC3, ord("y")]) == "�x�y"


def test_silent_and_unknown_tokens_give_nothing() -> None:
    detokenizer = Detokenizer(byte_table(silent=frozenset({259})))
    assert detokenizer.push([ord("a"), 259, 99999, ord("b")]) == "ab"


def test_a_silent_token_inside_a_character_does_not_break_it() -> None:
    detokenizer = Detokenizer(byte_table(silent=frozenset({259})))
    first, second = "é".encode()
    assert detokenizer.push([first]) + detokenizer.push([259]) + detokenizer.push([second]) == "é"


@pytest.mark.parametrize("strip", [0, 1])
@given(texts=st.lists(st.sampled_from([*range(256, 261), *(("t", t) for t in TEXTS)]), max_size=8))
def test_sentencepiece_equals_the_library(strip: int, texts: list[int | tuple[str, str]]) -> None:
    """Byte tokens of whole characters mixed with pieces, as a model writes them."""
    library = piece_library(strip)
    ids = [i for item in texts for i in ([item] if isinstance(item, int) else item[1].encode())]
    detokenizer = Detokenizer(table_of(library))
    assert "".join([*(detokenizer.push([i]) for i in ids), detokenizer.flush()]) == library.decode(ids)


def test_sentencepiece_strips_the_first_space_only() -> None:
    detokenizer = Detokenizer(table_of(piece_library(1)))
    assert [detokenizer.push([i]) for i in (256, 256, 258)] == ["the", " the", "re"]


def test_sentencepiece_space_that_comes_late_is_still_the_first() -> None:
    detokenizer = Detokenizer(table_of(piece_library(1)))
    assert [detokenizer.push([i]) for i in (257, 256)] == ["", " the"]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("<0xE2>", b"\xe2"), ("<0xZZ>", b"<0xZZ>"), ("▁a▁", b" a "), ("<0x1>", b"<0x1>")],
)
def test_sentencepiece_bytes(piece: str, expected: bytes) -> None:
    assert sentencepiece(piece) == expected


def test_an_added_token_with_a_space_is_its_own_text() -> None:
    assert byte_level("<tool call>") == b"<tool call>"


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "CTC"}]}])
def test_other_decoders_are_not_supported(decoder: dict[str, object] | None) -> None:
    assert bytes_of_decoder(decoder) is None


@needs_smollm2
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=60))
def test_smollm2_random_tokens_equal_the_library(
    ids: list[int], smollm2: tuple[tokenizer.Tokenizer, Tokenizer]
) -> None:
    ours, library = smollm2
    detokenizer = ours.detokenizer()
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join([*pieces, detokenizer.flush()]) == library.decode(ids, skip_special_tokens=True)


@needs_smollm2
def test_smollm2_real_text(smollm2: tuple[tokenizer.Tokenizer, Tokenizer]) -> None:
    ours, library = smollm2
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8")]:
        ids = library.encode(text).ids
        detokenizer = ours.detokenizer()
        assert "".join([*(detokenizer.push([i]) for i in ids), detokenizer.flush()]) == library.decode(ids)
