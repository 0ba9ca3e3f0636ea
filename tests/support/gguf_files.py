"""Tiny GGUF files for tests: a whole model of a few kilobytes, any part of which a test may change or leave out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def byte_pieces() -> list[str]:
    """GPT-2's character of each byte: itself where printable, else the next one from 256 up."""
    moved = iter(range(256, 512))
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def write_gguf(
    path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Any]]
) -> Path:
    """``tensors``: name to (values as they lie in the file, ggml type or None for the array's own)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_fields(
    tokens: list[str], merges: list[str], *, pre: str = "gpt-2", special: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Tokenizer metadata of a byte-level BPE: 256 bytes, ``tokens``, then ``special`` ones."""
    pieces = [*byte_pieces(), *tokens, *special]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3 if piece in special else 1 for piece in pieces],
        "tokenizer.ggml.merges": merges,
    }
