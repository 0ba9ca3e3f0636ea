"""Opening a checkpoint: find its files, know it by its hash, convert it once, map what was converted."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from biphase.engine.checkpoint import safetensors_file
from biphase.engine.checkpoint.cache import CachedFile, default_directory
from biphase.engine.checkpoint.dummy import dummy_config, dummy_hash, dummy_tensors
from biphase.engine.checkpoint.hf_source import HfSource
from biphase.engine.checkpoint.layout import EngineTensor, engine_tensors
from biphase.engine.checkpoint.safetensors_file import SafetensorsFile
from biphase.engine.checkpoint.shard import Cut, Shard
from biphase.engine.checkpoint.source import WeightSource, check_complete, model_hash
from biphase.engine.model_config import ModelConfig
from biphase.protos.errors import SetupError
from biphase.protos.model_source import ModelSource, resolve

FORMAT = "1"
"""Version of the converted file: counts up when names, fusing or row orders change."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model, or a rank's part of it, ready to run. Whole ``tensors`` and runs of rows are views of a mapped file that
    all processes of a host share: do not write (others, and dummy ones, are this process's own).

    Names and shapes: layout.py, shard.py. ``model_hash``: 16 bytes, the same whatever the dtype and the part;
    ``config`` is the whole model's.
    """

    config: ModelConfig
    model_hash: bytes
    tensors: dict[str, torch.Tensor]


def open_checkpoint(
    model: str,
    *,
    dtype: str,
    cache_dir: Path | None,
    progress: Progress,
    load_format: str = "auto",
    device: torch.device | None = None,
    shard: Shard | None = None,
) -> Checkpoint:
    """Map a model's weights in ``dtype``, converting them first when no process of this host has done so.

    ``cache_dir`` None: the default directory. ``progress(detail, fraction)`` is called while converting, or while
    another process does. ``load_format`` dummy: random weights instead (dummy.py), made on ``device``.
    ``shard``: a rank's part; None: all. Raises SetupError, one line, for everything that can be wrong with files, model,
    plan or disk.
    """
    if dtype not in DTYPES:
        raise SetupError(f"dtype {dtype!r} is not supported (supported: {', '.join(DTYPES)})")
    shard = shard or Shard.whole()
    if load_format == "dummy":
        config = dummy_config(model)
        _check_plan(model, config, shard)
        made = dummy_tensors(config, DTYPES[dtype], device or torch.device("cpu"), progress, shard=shard)
        return Checkpoint(config=config, model_hash=dummy_hash(config), tensors=made)
    found = resolve(model)
    source = _opened(found)
    _check_plan(model, source.config, shard)
    check_complete(source)
    digest = model_hash(source)
    tensors = _by_alignment(engine_tensors(source.config), DTYPES[dtype])
    cached = CachedFile(cache_dir or default_directory(), f"{digest.hex()}-{dtype}-{FORMAT}")
    mapped = _mapped(cached.path, tensors, dtype)
    if mapped is None:
        num_bytes = sum(math.prod(tensor.shape) for tensor in tensors) * DTYPES[dtype].itemsize
        with cached.locked(num_bytes, progress):
            mapped = _mapped(cached.path, tensors, dtype)  # the process that held the lock may have written it
            if mapped is None:
                _convert(source, tensors, dtype, cached, num_bytes, progress)
                mapped = _mapped(cached.path, tensors, dtype)
    if mapped is None:
        raise SetupError(f"{cached.path}: cannot be read back after it was written")
    if shard.plan.num_ranks == 1:
        mapped.will_need()
    ours = {cut.name: _part(mapped.tensor(cut.tensor.name), cut) for cut in shard.cuts(source.config)}
    return Checkpoint(config=source.config, model_hash=digest, tensors=ours)


def _check_plan(model: str, config: ModelConfig, shard: Shard) -> None:
    if reason := shard.reason_against(config):
        raise SetupError(f"{model}: {reason}")


def _part(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Contiguous: rows that are one run stay where they are, everything else is copied."""
    if cut.is_whole:
        return tensor
    parts = [tensor.narrow(cut.axis, run.start, len(run)) for run in cut.runs]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=cut.axis)


def _opened(found: ModelSource) -> WeightSource:
    if found.kind == "directory":
        return HfSource(found.path)
    from biphase.engine.checkpoint.gguf_source import GgufSource  # a machine without GGUF models needs no gguf package

    return GgufSource(found.path)


def _by_alignment(tensors: list[EngineTensor], dtype: torch.dtype) -> list[EngineTensor]:
    """Sizes that are multiples of 64 bytes first, so that all of those start at one; the model's order otherwise."""

    def odd(tensor: EngineTensor) -> int:
        size = math.prod(tensor.shape) * dtype.itemsize
        return -min(64, size & -size)

    return sorted(tensors, key=odd)


def _mapped(path: Path, tensors: list[EngineTensor], dtype: str) -> SafetensorsFile | None:
    """The cached file, or None where it is absent or is not what the conversion writes."""
    if not path.is_file():
        return None
    try:
        file = SafetensorsFile(path)
    except SetupError:
        return None
    code = next(code for code, value in safetensors_file.DTYPES.items() if value is DTYPES[dtype])
    found = {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()}
    expected = {tensor.name: (tensor.shape, code) for tensor in tensors}
    return file if found == expected and file.metadata.get("format") == FORMAT else None


def _convert(
    source: WeightSource,
    tensors: list[EngineTensor],
    dtype: str,
    cached: CachedFile,
    num_bytes: int,
    progress: Progress,
) -> None:
    def built() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in tensors:
            parts = [source.read(part.name).to(DTYPES[dtype]) for part in tensor.parts]
            yield tensor.name, (parts[0] if len(parts) == 1 else torch.cat(parts)).view(tensor.shape)

    detail = f"converting weights to {dtype}"
    progress(detail, 0.0)
    metadata = {"format": FORMAT, "config": source.config.to_json(), "source": source.path.name}
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    with cached.replacing(num_bytes) as file:
        for written in safetensors_file.write(file, shapes, DTYPES[dtype], metadata, built()):
            progress(detail, min(1.0, written / num_bytes))
