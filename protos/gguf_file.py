"""Reading a GGUF file's header: metadata and where each tensor's bytes lie. Standard library only.

Written for start-up time: a vocabulary is walked, not decoded, until somebody asks for it, so that opening a file of
50,000 tokens takes some 30 ms (the ``gguf`` package's reader takes seconds for the same). Format: ggml's gguf.md,
versions 2 and 3, little endian.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biphase.protos.errors import SetupError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 28
"""More keys, tensors or array items than this mean a broken file."""
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor: ``shape`` row-major (slowest first), ``type_id`` ggml's, ``offset`` of its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array that was walked over: items of ``kind`` from ``offset`` on."""

    kind: int
    count: int
    offset: int


class GgufFile:
    """An open GGUF file. ``keys`` and ``tensors`` are read at once, values on demand; ``data`` is the mapped file."""

    def __init__(self, path: Path) -> None:
        """Raises SetupError, one line, for a file that is missing, truncated or no GGUF."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise SetupError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        self._values: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read_header()
        except (struct.error, IndexError) as error:
            raise SetupError(f"{path}: truncated GGUF file ({len(self.data)} bytes, the header goes on)") from error
        except (UnicodeDecodeError, ValueError) as error:
            raise SetupError(f"{path}: broken GGUF file ({error})") from error

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"<GgufFile {self.path.name} [{len(self._values)} keys, {len(self.tensors)} tensors]>"

    @property
    def keys(self) -> list[str]:
        return list(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value: int, float, bool, str, or a list of them; ``default`` where the file has no such key."""
        value = self._values.get(key, default)
        if not isinstance(value, _Array):
            return value
        try:
            return self._decode(value)
        except UnicodeDecodeError as error:
            raise SetupError(f"{self.path}: broken GGUF file ({key} is not UTF-8)") from error

    def require(self, key: str) -> Any:
        """A key's value; SetupError naming the key where the file has none."""
        if key not in self._values:
            raise SetupError(f"{self.path}: the GGUF file has no {key}")
        return self.get(key)

    def _read_header(self) -> None:
        data = self.data
        if data[:4] != MAGIC:
            raise SetupError(f"{self.path}: not a GGUF file (it begins with {data[:4]!r}, not {MAGIC!r})")
        version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
        if version not in _VERSIONS:
            raise SetupError(f"{self.path}: GGUF version {version} is not supported (versions 2 and 3 are)")
        if max(num_tensors, num_keys) > _MAX_COUNT:
            raise ValueError(f"{num_tensors} tensors and {num_keys} keys announced")
        at = 24
        for _ in range(num_keys):
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", data, at)
            self._values[key], at = self._value(kind, at + 4)
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            name, at = self._string(at)
            (num_dims,) = struct.unpack_from("<I", data, at)
            if num_dims > _MAX_DIMS:
                raise ValueError(f"tensor {name} has {num_dims} dimensions")
            dims = struct.unpack_from(f"<{num_dims}Q", data, at + 4)
            at += 4 + 8 * num_dims
            type_id, offset = struct.unpack_from("<IQ", data, at)
            at += 12
            found.append((name, tuple(reversed(dims)), type_id, offset))
        alignment = self._values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        start = -(-at // alignment) * alignment
        self.tensors = {
            name: GgufTensor(name=name, shape=shape, type_id=type_id, offset=start + offset)
            for name, shape, type_id, offset in found
        }

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self.data, at)
        end = at + 8 + length
        if end > len(self.data):
            raise IndexError(end)
        return self.data[at + 8 : end].decode("utf-8"), end

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        """One value and the offset behind it; arrays are only walked over."""
        if kind in _SCALARS:
            (value,) = struct.unpack_from(_SCALARS[kind], self.data, at)
            return value, at + struct.calcsize(_SCALARS[kind])
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            raise ValueError(f"value type {kind} at byte {at}")
        item, count = struct.unpack_from("<IQ", self.data, at)
        if count > _MAX_COUNT:
            raise ValueError(f"an array of {count} items at byte {at}")
        at += 12
        array = _Array(item, count, at)
        if item in _SCALARS:
            at += count * struct.calcsize(_SCALARS[item])
        elif item == _STRING:
            length_at = struct.Struct("<Q").unpack_from
            for _ in range(count):
                at += 8 + length_at(self.data, at)[0]
        else:
            raise ValueError(f"an array of type {item} at byte {at}")
        if at > len(self.data):
            raise IndexError(at)
        return array, at

    def _decode(self, array: _Array) -> list[Any]:
        if array.kind in _SCALARS:
            return list(struct.unpack_from(f"<{array.count}{_SCALARS[array.kind][1]}", self.data, array.offset))
        items, at = [], array.offset
        for _ in range(array.count):
            text, at = self._string(at)
            items.append(text)
        return items
