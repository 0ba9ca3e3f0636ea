"""A checkpoint without files: random weights of any configuration, for measuring and for tests.

Each element is a function of (seed, tensor name, index) alone, so that every process of every plan holds the same
model, whatever its device, and a slice can be made without the rest.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from biphase.engine.checkpoint import hf_config
from biphase.engine.checkpoint.layout import EngineTensor
from biphase.engine.checkpoint.shard import Shard
from biphase.engine.model_config import ModelConfig
from biphase.kernels.dummy_weights import fill
from biphase.protos.errors import SetupError, one_line
from biphase.protos.model_source import resolve

_SEED = 0
_SPREAD = 0.02 * 3**0.5
"""Uniform from -_SPREAD to _SPREAD: a standard deviation of 0.02, with which models are initialised."""
_VERSION = "1"
"""Counts up when a value changes."""

Progress = Callable[[str, float], None]


def dummy_config(model: str) -> ModelConfig:
    """Of a config.json by any name, or of a model whose weights are left alone. Raises SetupError, one line."""
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return hf_config.config_of(path)
    found = resolve(model, weights=False)
    if found.kind == "directory":
        return hf_config.config_of(found.path)
    from biphase.engine.checkpoint import gguf_config
    from biphase.protos.gguf_file import GgufFile

    return gguf_config.config_of(GgufFile(found.path))


def dummy_hash(config: ModelConfig, *, seed: int = _SEED) -> bytes:
    """16 bytes that tell it from every other model, real ones too."""
    return xxhash.xxh3_128(f"dummy {_VERSION} {seed}\n{config.to_json()}".encode()).digest()


def dummy_tensors(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    *,
    seed: int = _SEED,
    shard: Shard | None = None,
) -> dict[str, torch.Tensor]:
    """All of a model's tensors, or a rank's, on ``device``. Raises SetupError when they do not fit."""
    tensors = {}
    planned = list((shard or Shard.whole()).cuts(config))
    for i, cut in enumerate(planned):
        progress("making dummy weights", i / len(planned))
        parts = [
            dummy_tensor(cut.tensor, dtype, device, axis=cut.axis, part=slice(run.start, run.stop), seed=seed)
            for run in cut.runs
        ]
        tensors[cut.name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut.axis)
    return tensors


def dummy_tensor(
    tensor: EngineTensor,
    dtype: torch.dtype,
    device: torch.device,
    *,
    axis: int = 0,
    part: slice | None = None,
    seed: int = _SEED,
) -> torch.Tensor:
    """``tensor``, or the ``part`` of it (step 1) along ``axis``, made without the rest. Norms are ones."""
    before, extent, after = tensor.shape[:axis], tensor.shape[axis], tensor.shape[axis + 1 :]
    start, end, _ = (part or slice(None)).indices(extent)
    try:
        out = torch.empty((*before, end - start, *after), dtype=dtype, device=device)
    except RuntimeError as error:  # so does torch report too little memory
        raise SetupError(f"no memory on {device} for {tensor.name} {list(tensor.shape)}: {one_line(error)}") from error
    if tensor.name.endswith("norm"):
        return out.fill_(1)
    key = xxhash.xxh3_64_intdigest(f"{seed} {tensor.name}".encode())
    # from the axis on, elements are one run in the part as in the whole
    inner = math.prod(after)
    runs = out.view(math.prod(before), (end - start) * inner)
    fill(runs, key, spread=_SPREAD, first=start * inner, pitch=extent * inner)
    return out
