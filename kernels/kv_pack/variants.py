"""Production launches of ``pack`` and ``unpack``: a whole prompt of 8192 tokens, as the bench has it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack.codec import CODECS, packed_bytes
from biphase.kernels.kv_pack.torch_pool import layout_of
from biphase.kernels.kv_pack.triton_gpu import pack, unpack

_TOKENS = 8192
_WIDE = frozenset({"wide_loads"})


def variants() -> list[Variant]:
    """Qwen3-8B and Mixtral-8x7B have Llama-3-8B's heads; layers do not specialise a kernel."""
    found = []
    for name, launcher in (("kv_pack", pack), ("kv_unpack", unpack)):
        raw = partial(_run, launcher, "raw")
        found.append(
            Variant(name=f"{name}/raw/llama-3-8b/bf16", run=partial(raw, torch.bfloat16), quick=True, traits=_WIDE)
        )
        found.append(Variant(name=f"{name}/raw/llama-3-8b/fp8", run=partial(raw, torch.float8_e4m3fn), traits=_WIDE))
        for head_dim in (64, 96, 256):
            found.append(
                Variant(
                    name=f"{name}/raw/head_dim-{head_dim}/bf16",
                    run=partial(raw, torch.bfloat16, head_dim=head_dim),
                    traits=_WIDE,
                )
            )
        for block_size in (16, 32, 128):
            found.append(
                Variant(
                    name=f"{name}/raw/block_size-{block_size}/bf16",
                    run=partial(raw, torch.bfloat16, block_size=block_size),
                    traits=_WIDE,
                )
            )
        for dtype in (torch.float16, torch.float32):
            found.append(Variant(name=f"{name}/raw/llama-3-8b/{_short(dtype)}", run=partial(raw, dtype), traits=_WIDE))
        for codec in CODECS:
            least = 89 if codec == "fp8" else 80
            coded = partial(_run, launcher, codec)
            found.append(
                Variant(
                    name=f"{name}/{codec}/llama-3-8b/bf16",
                    run=partial(coded, torch.bfloat16),
                    min_capability=least,
                    quick=codec == "int4",
                )
            )
            for dtype, head_dim, block_size in (
                (torch.float32, 64, 32),
                (torch.float16, 128, 64),
                (torch.bfloat16, 96, 64),
                (torch.bfloat16, 256, 128),
                (torch.bfloat16, 64, 16),
            ):
                found.append(
                    Variant(
                        name=f"{name}/{codec}/head_dim-{head_dim}/block_size-{block_size}/{_short(dtype)}",
                        run=partial(coded, dtype, head_dim=head_dim, block_size=block_size),
                        min_capability=least,
                    )
                )
        # from an instance with other blocks
        if launcher is unpack:
            other = partial(_run, launcher, "int4", torch.bfloat16, group_size=32)
            found.append(Variant(name=f"{name}/int4/llama-3-8b/groups-32/bf16", run=other))
    return found


def _run(
    launcher: Callable[..., None],
    codec: str,
    dtype: torch.dtype,
    *,
    head_dim: int = 128,
    block_size: int = 64,
    group_size: int = 0,
) -> None:
    num_layers, num_heads = 32, 8
    pool = torch.empty(num_layers, 512, 2, num_heads, block_size, head_dim, dtype=dtype, device="meta")
    table = torch.empty(_TOKENS // block_size + 1, dtype=torch.int32, device="meta")
    box = KvBox(layer_start=0, layer_end=num_layers, head_start=0, head_end=num_heads, token_start=0, token_end=_TOKENS)
    packed = replace(layout_of(pool), block_size=group_size or block_size)
    buffer = torch.empty(packed_bytes(packed, box, codec), dtype=torch.uint8, device="meta")
    groups = {"group_size": group_size} if group_size else {}
    launcher(pool, table, box, buffer, torch.empty(1, dtype=torch.int64, device="meta"), codec=codec, **groups)


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
