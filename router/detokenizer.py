"""Tokens back into text, a few at a time: whole characters only, in constant time per token.

Every token is a run of bytes; text is those bytes through an incremental UTF-8 decoder, which holds back an unfinished
character and puts U+FFFD for what can never become one. Special tokens give nothing. This covers the two kinds of
decoders that the supported models have: byte-level BPE, and SentencePiece pieces with byte fallback.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

SPACE_PIECE = "\u2581"
"""How SentencePiece writes a space inside a piece."""


def _byte_characters() -> Iterator[tuple[str, int]]:
    """GPT-2's printable character of each byte: itself where printable, else 256 and up in order."""
    moved = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield chr(byte), byte
        else:
            yield chr(256 + moved), byte
            moved += 1


BYTE_OF = dict(_byte_characters())


def byte_level(piece: str) -> bytes:
    """The bytes of a byte-level BPE token; one with foreign characters (an added token) is its own UTF-8."""
    try:
        return bytes([BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()


def sentencepiece(piece: str) -> bytes:
    """The bytes of a SentencePiece token: ``<0xE2>`` is one byte, the space sign a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(SPACE_PIECE, " ").encode()


def bytes_of_decoder(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], int] | None:
    """(piece to bytes, leading spaces to strip) for the ``decoder`` section of a tokenizer.json; None: not supported."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return byte_level, 0
    if decoder["type"] != "Sequence":
        return None
    steps = {step["type"]: step for step in decoder["decoders"]}
    if set(steps) == {"ByteLevel"}:
        return byte_level, 0
    if not {"Replace", "ByteFallback"} <= set(steps) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return None
    replace, strip = steps["Replace"], steps.get("Strip", {"content": " ", "start": 0, "stop": 0})
    if replace["pattern"] != {"String": SPACE_PIECE} or replace["content"] != " ":
        return None
    if strip["content"] != " " or strip["stop"]:
        return None
    return sentencepiece, int(strip["start"])


@dataclass(slots=True, kw_only=True)
class TokenBytes:
    """The bytes of every token, looked up once each. Shared by all detokenizers of a tokenizer; event loop or one thread.

    ``piece_of`` gives a token's piece, None for an id without one. ``silent`` are the special tokens' ids.
    ``strip_left``: so many spaces at the very start of an output are not text.
    """

    piece_of: Callable[[int], str | None]
    to_bytes: Callable[[str], bytes]
    silent: frozenset[int]
    strip_left: int = 0
    _known: dict[int, bytes] = field(default_factory=dict)

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            piece = None if token_id in self.silent else self.piece_of(token_id)
            known = self._known[token_id] = b"" if piece is None else self.to_bytes(piece)
        return known


class Detokenizer:
    """One output's text. ``"".join(push(...) for all tokens) + flush()`` is the text of all tokens at once."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_left = table.strip_left

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete; often none, never a part of one."""
        table = self._table
        return self._stripped(self._decoder.decode(b"".join([table[token_id] for token_id in token_ids])))

    def flush(self) -> str:
        """What is held back: nothing, or U+FFFD for a character that never came to its end. The output is over."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
            else:
                text = text[1:]
                self._strip_left -= 1
        return text
