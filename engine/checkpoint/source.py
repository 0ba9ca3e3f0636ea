"""What the conversion asks of a checkpoint, whatever its file format, and what it checks before it starts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from biphase.engine.checkpoint.layout import engine_tensors
from biphase.engine.model_config import ModelConfig
from biphase.protos.errors import SetupError

EDGE_BYTES = 4096
"""So much of each tensor's start and end goes into the model hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor as it lies in its file: ``shape`` row-major, ``dtype`` by the file format's own name."""

    shape: tuple[int, ...]
    dtype: str


class WeightSource(Protocol):
    """An opened checkpoint; tensors go by their Hugging Face names, rotary rows in Hugging Face order."""

    path: Path
    config: ModelConfig

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor of the file."""
        ...

    def edges(self) -> Iterator[tuple[str, bytes, bytes]]:
        """(name, first, last EDGE_BYTES at most) of every tensor's bytes in the file, in the order of the names."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor in a floating dtype. Raises SetupError when its bytes cannot be understood."""
        ...


def check_complete(source: WeightSource) -> None:
    """Every tensor that the configuration implies is there, in its shape, and nothing besides. Raises SetupError."""
    expected = {part.name: part.shape for tensor in engine_tensors(source.config) for part in tensor.parts}
    missing = [name for name in expected if name not in source.stored]
    if missing:
        raise SetupError(f"{source.path}: {_some(missing)} missing from the checkpoint")
    for name, shape in expected.items():
        if (found := source.stored[name].shape) != shape:
            raise SetupError(
                f"{source.path}: tensor {name} has shape {list(found)}, the configuration implies {list(shape)}"
            )
    # a bias that nobody adds would give wrong text without a word
    extra = [name for name in source.stored if name not in expected and not _harmless(name)]
    if extra:
        raise SetupError(f"{source.path}: {_some(extra)} not part of a {source.config.architecture} model")


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"{len(names)} tensors (the first: {names[0]}) are"


def _harmless(name: str) -> bool:
    """Tensors that older files carry and every implementation computes anew: a tied head, rotary frequencies."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def model_hash(source: WeightSource) -> bytes:
    """16 bytes that tell two models apart: xxh3-128 of the configuration and each tensor's name, shape, dtype, edges."""
    digest = xxhash.xxh3_128()
    digest.update(source.config.to_json().encode())
    for name, first, last in source.edges():
        stored = source.stored[name]
        digest.update(f"\n{name} {list(stored.shape)} {stored.dtype}\n".encode())
        digest.update(first)
        digest.update(last)
    return digest.digest()
