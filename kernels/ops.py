"""The one interface between the model and its kernels; a backend is chosen by device.

Activations are feature-major, ``[features, tokens]``, because the CPU's dense products run up to three times faster
that way (docs/decisions); token counts are padded to ``padded_tokens``. ``BIPHASE_KERNELS`` overrides the choice.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from biphase.kernels import (
    decode_attention,
    linear,
    moe,
    prefill_attention,
    rms_norm,
    rope_and_cache,
    sample,
    silu_mul,
)

Op = Callable[..., Any]


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
    moe: ModuleType
    sample: ModuleType


_CPU = Kernels(
    name="torch",
    linear=linear,
    rms_norm=rms_norm,
    rope_and_cache=rope_and_cache,
    prefill_attention=prefill_attention,
    decode_attention=decode_attention,
    silu_mul=silu_mul,
    moe=moe,
    sample=sample,
)


def cpu_kernels() -> Kernels:
    """The ops of the CPU's step."""
    return _CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What an engine runs its step with. ``token_major``: activations ``[N, features]`` and a paged step as on a GPU."""

    name: str
    token_major: bool
    reason: str


def choose_backend(device: str) -> Backend:
    """By device, unless BIPHASE_KERNELS says otherwise. Raises ValueError, one line, for what cannot run there."""
    asked = os.environ.get("BIPHASE_KERNELS") or None
    on_gpu = device.startswith("cuda")
    name = asked or ("triton" if on_gpu else "torch")
    if name not in ("torch", "triton"):
        raise ValueError(f"BIPHASE_KERNELS={name!r} has no kernels; backends: torch, triton")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError(f"Triton kernels on {device} need the package triton: pip install 'biphase[gpu]'")
    if name == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("Triton kernels on the cpu run in Triton's interpreter only: set TRITON_INTERPRET=1")
    reason = f"BIPHASE_KERNELS={asked} says" if asked else f"the default of device {device}"
    return Backend(name=name, token_major=on_gpu or name == "triton", reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKernels:
    """The ops of the token-major step; one backend's launchers, which all take the same arguments as the references."""

    name: str
    embed: Op
    rms_norm: Op
    add_rms_norm: Op
    linear: Op
    silu_mul: Op
    rotation_table: Op
    rope_and_cache: Op
    plan_prefill: Op
    prefill_attention: Op
    decode_workspace: Op
    plan_decode: Op
    decode_attention: Op
