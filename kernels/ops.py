"""The one interface between the model and its kernels; a backend is chosen by device.

Activations are feature-major, ``[features, tokens]``, because the CPU's dense products run up to three times faster
that way (docs/decisions); token counts are padded to ``padded_tokens``. ``BIPHASE_KERNELS`` overrides the choice.
"""

import os
from dataclasses import dataclass
from types import ModuleType

from biphase.kernels import (
    decode_attention,
    linear,
    prefill_attention,
    rms_norm,
    rope_and_cache,
    sample,
    silu_mul,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One backend: the module of each op. Every op of a backend takes the arguments its module documents."""

    name: str
    linear: ModuleType
    rms_norm: ModuleType
    rope_and_cache: ModuleType
    prefill_attention: ModuleType
    decode_attention: ModuleType
    silu_mul: ModuleType
    sample: ModuleType


_TORCH = Kernels(
    name="torch",
    linear=linear,
    rms_norm=rms_norm,
    rope_and_cache=rope_and_cache,
    prefill_attention=prefill_attention,
    decode_attention=decode_attention,
    silu_mul=silu_mul,
    sample=sample,
)
_BACKENDS = {_TORCH.name: _TORCH}
_BY_DEVICE = {"cpu": _TORCH.name}


def select_kernels(device: str) -> Kernels:
    """The backend for ``device``. Raises ValueError naming what there is."""
    name = os.environ.get("BIPHASE_KERNELS") or _BY_DEVICE.get(device)
    if name not in _BACKENDS:
        asked = f"BIPHASE_KERNELS={name!r}" if os.environ.get("BIPHASE_KERNELS") else f"device {device!r}"
        raise ValueError(f"{asked} has no kernels; backends: {', '.join(_BACKENDS)}")
    return _BACKENDS[name]
