"""Weights from a Hugging Face directory: one safetensors file, or shards named by an index."""

from collections.abc import Iterator
from pathlib import Path

import torch

from biphase.engine.checkpoint.hf_config import config_of
from biphase.engine.checkpoint.safetensors_file import SafetensorsFile
from biphase.engine.checkpoint.source import EDGE_BYTES, Stored
from biphase.protos.errors import SetupError
from biphase.protos.model_source import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HfSource:
    """An opened directory as a WeightSource. Owns the mappings of its files."""

    def __init__(self, folder: Path) -> None:
        """Raises SetupError, one line: unsupported model, missing or truncated shard."""
        self.path = folder
        self.config = config_of(folder)
        self._home: dict[str, SafetensorsFile] = {}
        for path, wanted in _files(folder).items():
            file = SafetensorsFile(path)
            for name in file.entries if wanted is None else wanted:
                if name not in file.entries:
                    raise SetupError(f"{path}: no tensor {name}, though {_INDEX} says so")
                self._home[name] = file
        self.stored = {
            name: Stored(shape=file.entries[name].shape, dtype=file.entries[name].dtype)
            for name, file in self._home.items()
        }

    def edges(self) -> Iterator[tuple[str, bytes, bytes]]:
        for name in sorted(self._home):
            file = self._home[name]
            start, end = file.entries[name].start, file.entries[name].end
            yield name, file.data[start : min(end, start + EDGE_BYTES)], file.data[max(start, end - EDGE_BYTES) : end]

    def read(self, name: str) -> torch.Tensor:
        return self._home[name].tensor(name)


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files, each with the tensors wanted of it (None: all)."""
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SetupError(f"{index}: no weight_map")
        shards: dict[Path, list[str] | None] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise SetupError(f"{index}: tensor {name} is said to be in {shard!r}, not a file name")
            names = shards.setdefault(folder / shard, [])
            assert names is not None
            names.append(name)
        return shards
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    raise SetupError(f"{folder}: no {_SINGLE} and no {_INDEX} (weights are read as safetensors or GGUF only)")
