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
    if (name == "triton" or on_gpu) and importlib.util.find_spec("triton") is None:
        raise ValueError(f"device {device} with {name} kernels needs the package triton: pip install 'biphase[gpu]'")
    if name == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "BIPHASE_KERNELS=triton runs on a GPU; on the cpu only this project's tests use these kernels, interpreted"
        )
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
    routing_workspace: Op
    route: Op
    grouped_gate_up: Op
    grouped_down: Op
    combine: Op
    sample: Op
    no_more_compiling: Op
    """Called when the step's kernels have all been used: what is compiled from now on is told in the log."""
    capturable: bool
    """Whether a CUDA graph can hold the step: nothing in it is read by the host."""


def paged_kernels(name: str) -> PagedKernels:
    """``triton``: the GPU's kernels (interpreted where TRITON_INTERPRET=1). ``torch``: their references, slow, anywhere."""
    from biphase.kernels.decode_attention.workspace import DecodeWorkspace
    from biphase.kernels.linear.rows import linear_rows
    from biphase.kernels.moe.routing import RoutingWorkspace
    from biphase.kernels.prefill_attention.tile_plan import plan_prefill
    from biphase.kernels.rope_and_cache.rotation_table import rotation_table

    shared: dict[str, Op] = {
        "linear": linear_rows,
        "rotation_table": rotation_table,
        "plan_prefill": plan_prefill,
        "decode_workspace": DecodeWorkspace.allocate,
        "routing_workspace": RoutingWorkspace,
    }
    ops = _triton_ops() if name == "triton" else _reference_ops()
    return PagedKernels(name=name, capturable=name == "triton", **shared, **ops)


def _triton_ops() -> dict[str, Op]:
    from biphase.kernels.decode_attention import triton_gpu as decode
    from biphase.kernels.embed.triton_gpu import embed
    from biphase.kernels.gpu import compile_count
    from biphase.kernels.moe import triton_gpu as moe
    from biphase.kernels.prefill_attention.triton_gpu import prefill_attention as prefill
    from biphase.kernels.rms_norm.triton_gpu import add_rms_norm
    from biphase.kernels.rms_norm.triton_gpu import rms_norm as norm
    from biphase.kernels.rope_and_cache.triton_gpu import rope_and_cache as rope
    from biphase.kernels.sample.triton_gpu import sample as draw
    from biphase.kernels.silu_mul.triton_gpu import silu_mul as gate

    compile_count.install()
    return {
        "embed": embed,
        "rms_norm": norm,
        "add_rms_norm": add_rms_norm,
        "silu_mul": gate,
        "rope_and_cache": rope,
        "prefill_attention": prefill,
        "plan_decode": decode.plan_decode,
        "decode_attention": decode.decode_attention,
        "route": moe.route,
        "grouped_gate_up": moe.grouped_gate_up,
        "grouped_down": moe.grouped_down,
        "combine": moe.combine,
        "sample": draw,
        "no_more_compiling": compile_count.seal,
    }


def _reference_ops() -> dict[str, Op]:
    from biphase.kernels.decode_attention.reference import decode_attention_paged_reference
    from biphase.kernels.embed.reference import embed_reference
    from biphase.kernels.moe import reference as moe
    from biphase.kernels.prefill_attention.reference import prefill_attention_paged_reference
    from biphase.kernels.rms_norm.reference import add_rms_norm_rows_reference, rms_norm_rows_reference
    from biphase.kernels.rope_and_cache.reference import rope_and_cache_paged_reference
    from biphase.kernels.sample.reference import rows_reference
    from biphase.kernels.silu_mul.reference import silu_mul_rows_reference

    return {
        "embed": embed_reference,
        "rms_norm": rms_norm_rows_reference,
        "add_rms_norm": add_rms_norm_rows_reference,
        "silu_mul": silu_mul_rows_reference,
        "rope_and_cache": rope_and_cache_paged_reference,
        "prefill_attention": prefill_attention_paged_reference,
        "plan_decode": lambda context_lens, query_starts, workspace: None,
        "decode_attention": decode_attention_paged_reference,
        "route": moe.route_rows_reference,
        "grouped_gate_up": moe.grouped_gate_up_reference,
        "grouped_down": moe.grouped_down_reference,
        "combine": moe.combine_reference,
        "sample": rows_reference,
        "no_more_compiling": lambda: None,
    }
