"""Safetensors files: checked on opening, mapped without a copy, written tensor by tensor.

The mapping is private and copy-on-write: torch sees writable memory, nobody writes, and so every process that maps
the file shares the kernel's one cached copy of it. Format: huggingface/safetensors, README "Format".
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from biphase.protos.errors import SetupError, one_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 << 20
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor: ``start`` and ``end`` are byte offsets in the file."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


class SafetensorsFile:
    """An open safetensors file. ``metadata`` is its free text; ``data`` the mapped file."""

    def __init__(self, path: Path) -> None:
        """Raises SetupError, one line, for a file that is missing, truncated or no safetensors file."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise SetupError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        try:
            self._read_header()
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(f"{path}: broken safetensors file ({one_line(error)})") from error

    def __repr__(self) -> str:
        return f"<SafetensorsFile {self.path.name} [{len(self.entries)} tensors, {len(self.data)} bytes]>"

    def _read_header(self) -> None:
        total = len(self.data)
        (length,) = struct.unpack_from("<Q", self.data)
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes announced, at most {_MAX_HEADER_BYTES} are allowed")
        base = 8 + length
        if base > total:
            raise SetupError(f"{self.path}: truncated safetensors file ({total} bytes, the header ends at {base})")
        header: dict[str, Any] = json.loads(self.data[8:base])
        self.metadata = header.pop("__metadata__", {})
        last = base
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not (0 <= start <= end) or any(extent < 0 for extent in entry["shape"]):
                raise ValueError(f"tensor {name} lies at {start}..{end} with shape {entry['shape']}")
            dtype = DTYPES.get(entry["dtype"])
            if dtype is not None and math.prod(entry["shape"]) * dtype.itemsize != end - start:
                raise ValueError(f"tensor {name} of shape {entry['shape']} {entry['dtype']} has {end - start} bytes")
            self.entries[name] = Entry(
                shape=tuple(entry["shape"]), dtype=entry["dtype"], start=base + start, end=base + end
            )
            last = max(last, base + end)
        if last != total:
            word = "truncated" if last > total else "overlong"
            raise SetupError(f"{self.path}: {word} safetensors file ({total} bytes, its tensors end at {last})")

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped bytes; writing to it is a mistake. Raises SetupError for a dtype that torch math lacks."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise SetupError(f"{self.path}: tensor {name} is {entry.dtype} (supported: {', '.join(DTYPES)})")
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:  # a header of odd length shifts everything behind it
            raw = torch.frombuffer(bytearray(self.data[entry.start : entry.end]), dtype=dtype)
            return raw.view(entry.shape)
        count = (entry.end - entry.start) // dtype.itemsize
        return torch.frombuffer(self.data, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def will_need(self) -> None:
        """Ask the kernel to read the file ahead; returns at once."""
        self.data.madvise(mmap.MADV_WILLNEED)


def write(
    file: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[int]:
    """Write one dtype's ``tensors``, taken one at a time and in the order of ``shapes``; yields the bytes written so far.

    Data begins at a multiple of 64 bytes, and so does every tensor whose predecessors' sizes are multiples of it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    written = file.write(struct.pack("<Q", len(text)) + text)
    for (name, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
        if name != expected or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} written in the place of {expected} {shape}")
        values = tensor.to(dtype).contiguous()
        written += file.write(values.view(torch.uint8).reshape(-1).numpy().data)
        yield written
