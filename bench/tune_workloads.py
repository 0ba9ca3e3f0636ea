"""What candidates are measured on: launches on real buffers, of production shapes, one or two per shape class.

``small``: a few tokens and heads instead, so that the interpreter can run them and a test can show that they work.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]
_BF16, _FP8 = torch.bfloat16, torch.float8_e4m3fn
_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``make`` lays out fresh buffers and returns the launch to be timed, under the settings in force when it is called.

    ``num_bytes``: what one launch reads and writes, about.
    """

    op: str
    name: str
    num_bytes: int
    make: Callable[[], Call]


def workloads(device: torch.device, capability: int, *, small: bool = False) -> list[Workload]:
    return [
        *_rows_workloads(device, small),
        *_attention_workloads(device, small, fp8=capability >= 89),
        *_transfer_workloads(device, small),
        *_expert_workloads(device, small),
        *_sample_workloads(device, small),
    ]


def _rows_workloads(device: torch.device, small: bool) -> Iterator[Workload]:
    from biphase.kernels.rms_norm.triton_gpu import add_rms_norm
    from biphase.kernels.silu_mul.triton_gpu import silu_mul

    def norm(rows: int, features: int) -> Call:
        x, residual, out = (torch.randn(rows, features, device=device).to(_BF16) for _ in range(3))
        weight = torch.ones(features, dtype=_BF16, device=device)
        return lambda: add_rms_norm(x, residual, weight, 1e-5, out)

    def gate(rows: int, width: int) -> Call:
        gate_up, out = (torch.randn(rows, size, device=device).to(_BF16) for size in (2 * width, width))
        return lambda: silu_mul(gate_up, out)

    for rows in (2, 3) if small else (16, 8192):
        for features in (64,) if small else (4096, 5120, 8192):
            yield _workload("rms_norm", f"{rows} x {features}", 8 * rows * features, partial(norm, rows, features))
        for width in (64,) if small else (14336, 12288):
            yield _workload("silu_mul", f"{rows} x {width}", 6 * rows * width, partial(gate, rows, width))
        heads, kv_heads, dim = (2, 1, 64) if small else (32, 8, 128)
        yield _workload(
            "rope_and_cache",
            f"{rows} x ({heads}, {kv_heads}, {dim})",
            4 * rows * (heads + 2 * kv_heads) * dim,
            partial(_rope, device, rows, heads, kv_heads, dim),
        )


def _rope(device: torch.device, rows: int, heads: int, kv_heads: int, dim: int) -> Call:
    from biphase.kernels.rope_and_cache.triton_gpu import rope_and_cache, rotation_table

    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device).to(_BF16)
    pool, _ = _pool(device, 1, -(-rows // _BLOCK_SIZE), kv_heads, dim, _BF16)
    positions = torch.arange(rows, dtype=torch.int32, device=device)
    slots = torch.randperm(pool.shape[0] * _BLOCK_SIZE, device=device)[:rows]
    table = rotation_table([0.9**i for i in range(dim // 2)], rows, device)
    return lambda: rope_and_cache(qkv, positions, slots, table, pool, num_heads=heads)


def _pool(
    device: torch.device, seqs: int, width: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's pool, full of numbers, and tables of ``seqs`` sequences that share nothing, their blocks shuffled."""
    pool = torch.randn(seqs * width, 2, kv_heads, _BLOCK_SIZE, dim, device=device, dtype=_BF16).to(dtype)
    return pool, torch.randperm(seqs * width, device=device).to(torch.int32).view(seqs, width)


def _attention_workloads(device: torch.device, small: bool, *, fp8: bool) -> Iterator[Workload]:
    for dtype in (_BF16, _FP8) if fp8 else (_BF16,):
        name = "fp8" if dtype == _FP8 else "bf16"
        for query, context in ((5, 70),) if small else ((8192, 8192), (2048, 32768)):
            size = 2 * 8 * 128 * context * dtype.itemsize
            make = partial(_prefill, device, query, context, dtype, small)
            yield _workload("prefill_attention", f"{query} of {context}, {name}", size, make)
        for seqs, context in ((2, 70),) if small else ((64, 4096), (8, 32768)):
            size = 2 * 8 * 128 * seqs * context * dtype.itemsize
            make = partial(_decode, device, seqs, context, dtype, small)
            yield _workload("decode_attention", f"{seqs} x {context}, {name}", size, make)


def _prefill(device: torch.device, query: int, context: int, dtype: torch.dtype, small: bool) -> Call:
    from biphase.kernels.prefill_attention.triton_gpu import plan_prefill, prefill_attention

    heads, kv_heads, dim = (2, 1, 64) if small else (32, 8, 128)
    pool, tables = _pool(device, 1, -(-context // _BLOCK_SIZE), kv_heads, dim, dtype)
    q, out = (torch.randn(query, heads, dim, device=device).to(_BF16) for _ in range(2))
    scale = torch.ones(2, kv_heads, device=device) if dtype == _FP8 else None
    plan = plan_prefill([query], [context], tables, pool, num_heads=heads)
    return lambda: prefill_attention(q, pool, plan, out, scale=dim**-0.5, kv_scale=scale)


def _decode(device: torch.device, seqs: int, context: int, dtype: torch.dtype, small: bool) -> Call:
    from biphase.kernels.decode_attention.triton_gpu import decode_attention, plan_decode
    from biphase.kernels.decode_attention.workspace import DecodeWorkspace

    heads, kv_heads, dim = (2, 1, 64) if small else (32, 8, 128)
    pool, tables = _pool(device, seqs, -(-context // _BLOCK_SIZE), kv_heads, dim, dtype)
    lens = torch.full((seqs,), context, dtype=torch.int32, device=device)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device)
    workspace = DecodeWorkspace.allocate(
        max_seqs=seqs,
        max_query_len=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=_BLOCK_SIZE,
        kv_dtype=dtype,
        device=device,
    )
    plan_decode(lens, starts, workspace)
    q, out = (torch.randn(seqs, heads, dim, device=device).to(_BF16) for _ in range(2))
    kv_scale = torch.ones(2, kv_heads, device=device) if dtype == _FP8 else None
    return lambda: decode_attention(q, pool, tables, lens, starts, workspace, out, scale=dim**-0.5, kv_scale=kv_scale)


def _transfer_workloads(device: torch.device, small: bool) -> Iterator[Workload]:
    layers, tokens, heads, dim = (2, 70, 1, 64) if small else (32, 8192, 8, 128)
    for codec in ("raw", "int8"):
        size = 2 * layers * tokens * heads * dim * (4 if codec == "raw" else 3)
        make = partial(_pack, device, codec, layers, tokens, heads, dim)
        yield _workload("kv_pack", f"{codec}, {tokens} tokens", size, make)


def _pack(device: torch.device, codec: str, layers: int, tokens: int, heads: int, dim: int) -> Call:
    from biphase.kernels.kv_layout import KvBox
    from biphase.kernels.kv_pack.codec import packed_bytes
    from biphase.kernels.kv_pack.torch_pool import layout_of
    from biphase.kernels.kv_pack.triton_gpu import pack

    width = -(-tokens // _BLOCK_SIZE)
    pool = torch.randn(layers, width, 2, heads, _BLOCK_SIZE, dim, device=device, dtype=_BF16)
    table = torch.randperm(width, device=device).to(torch.int32)
    box = KvBox(layer_start=0, layer_end=layers, head_start=0, head_end=heads, token_start=0, token_end=tokens)
    buffer = torch.empty(packed_bytes(layout_of(pool), box, codec), dtype=torch.uint8, device=device)
    total = torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: pack(pool, table, box, buffer, total, codec=codec)


def _expert_workloads(device: torch.device, small: bool) -> Iterator[Workload]:
    models = {"mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768)}
    for model, shape in ({"tiny": (2, 1, 64, 64)} if small else models).items():
        experts, taken, hidden, inter = shape
        for tokens in (3,) if small else (64, 8192):
            for kind in ("gate_up", "down"):
                size = 2 * min(experts, tokens * taken) * hidden * inter * (2 if kind == "gate_up" else 1)
                make = partial(_experts, device, kind, tokens, *shape)
                yield _workload("moe_product", f"{model} {kind}, {tokens} tokens", size, make)


def _experts(device: torch.device, kind: str, tokens: int, experts: int, taken: int, hidden: int, inter: int) -> Call:
    from biphase.kernels.moe.routing import RoutingWorkspace
    from biphase.kernels.moe.triton_gpu import grouped_down, grouped_gate_up, route

    workspace = RoutingWorkspace(max_tokens=tokens, num_experts=experts, num_taken=taken, dtype=_BF16, device=device)
    logits = torch.randn(tokens, -(-experts // 8) * 8, device=device).to(_BF16)[:, :experts]
    routing = route(logits, workspace, renormalize=True)
    pairs = tokens * taken
    if kind == "gate_up":
        x, out = (torch.randn(*s, device=device).to(_BF16) for s in ((tokens, hidden), (pairs, inter)))
        weights = torch.randn(experts, 2 * inter, hidden, device=device, dtype=_BF16)
        return lambda: grouped_gate_up(x, weights, routing, out)
    x, out = (torch.randn(pairs, size, device=device).to(_BF16) for size in (inter, hidden))
    weights = torch.randn(experts, hidden, inter, device=device, dtype=_BF16)
    return lambda: grouped_down(x, weights, routing, out)


def _sample_workloads(device: torch.device, small: bool) -> Iterator[Workload]:
    vocab = 304 if small else 128_256
    for rows in (2,) if small else (1, 64):
        yield _workload("sample", f"{rows} x {vocab}", 4 * rows * vocab, partial(_sample, device, rows, vocab))


def _sample(device: torch.device, rows: int, vocab: int) -> Call:
    from biphase.kernels.sample.buffers import SampleOut, SampleWorkspace
    from biphase.kernels.sample.draw_row import DrawRow
    from biphase.kernels.sample.params import SampleParams
    from biphase.kernels.sample.triton_gpu import sample

    params = SampleParams(max_rows=rows, vocab_size=vocab, device=device)
    options = ({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05, "logprobs": 20})
    draws = ({"temperature": 0.8, "seed": row, **options[row % len(options)]} for row in range(rows))
    params.fill([DrawRow(**draw) for draw in draws])
    out, workspace = SampleOut.allocate(rows, device), SampleWorkspace(max_rows=rows, vocab_size=vocab, device=device)
    logits = torch.randn(rows, vocab, device=device).to(_BF16)
    return lambda: sample(logits, params, out, workspace)


def _workload(op: str, name: str, num_bytes: int, make: Callable[[], Call]) -> Workload:
    return Workload(op=op, name=name, num_bytes=num_bytes, make=make)
