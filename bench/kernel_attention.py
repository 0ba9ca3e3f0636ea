"""Cases of decode and prefill attention over a paged cache whose blocks are shuffled."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from gpu_timing import Ceilings, device_of, median_us
from kernel_case import Result, Sizes, check

from biphase.kernels.decode_attention.triton_gpu import DecodeWorkspace, decode_attention, plan_decode
from biphase.kernels.prefill_attention.triton_gpu import plan_prefill, prefill_attention

FP8 = torch.float8_e4m3fn
BLOCK_SIZES = (16, 32, 64, 128)


class Cache:
    """Random K and V of sequences of the given lengths; with ``shared``, the first blocks of all are the same ones."""

    def __init__(self, sizes: Sizes, lengths: Sequence[int], dtype: torch.dtype, *, shared: int = 0) -> None:
        size, device = sizes.block_size, device_of()
        counts = [-(-length // size) for length in lengths]
        common = shared // size
        total = common + sum(count - common for count in counts)
        order = torch.randperm(total).tolist()
        self.pool = torch.empty(total, 2, sizes.kv_heads, size, sizes.head_dim, dtype=dtype, device=device)
        for block in self.pool.split(1024):
            block.copy_(torch.randn(block.shape, device=device))
        self.tables = torch.zeros(len(lengths), -(-max(counts) // 4) * 4, dtype=torch.int32)
        at = common
        for row, count in enumerate(counts):
            own = order[at : at + count - common]
            self.tables[row, :count] = torch.tensor(order[:common] + own, dtype=torch.int32)
            at += count - common
        self.tables = self.tables.to(device)
        self.kv_scale = torch.ones(2, sizes.kv_heads, device=device) if dtype == FP8 else None
        self.num_bytes = sum(lengths) * 2 * sizes.kv_heads * sizes.head_dim * dtype.itemsize


def decode_cases(sizes: Sizes, ceilings: Ceilings) -> Iterator[Result]:
    rng = random.Random(0)
    spread = [round(320 * (32_000 / 320) ** rng.random()) for _ in range(64)]
    loads = {
        "64 x 4k": ([4096] * 64, 0.85),
        "8 x 32k": ([32_768] * 8, 0.75),
        "64 of 320 to 32000": (spread, 0.75),
        "1 x 1k": ([1024], None),
    }
    times = {}
    for name, (lengths, bound) in loads.items():
        us, plan_us, num_bytes = _decode(sizes, lengths, sizes.dtype)
        times[name] = us
        note = f"plan {plan_us:.1f} us once per step"
        yield Result.moved(f"decode attention {name}", us, num_bytes, ceilings, bound, note)
    if not sizes.smoke:
        us, _, num_bytes = _decode(sizes, loads["64 x 4k"][0], FP8)
        faster = times["64 x 4k"] / us
        note = f"{num_bytes / us / 1e-6 / ceilings.copy:.2f} of copy"
        yield Result(name="decode attention fp8 64 x 4k", us=us, kind="ratio", value=faster, bound=1.5, note=note)
        us, _, _ = _decode(sizes, [4096] * 64, sizes.dtype, shared=3584)
        note = f"blocks of 3584 of 4096 tokens shared by 64; {times['64 x 4k'] / us:.2f} x as fast as without"
        yield Result.timed("decode attention shared prefix", us, None, note)
        for size in BLOCK_SIZES:
            us, _, num_bytes = _decode(replace(sizes, block_size=size), [4096] * 64, sizes.dtype)
            yield Result.moved(f"decode attention 64 x 4k, blocks of {size}", us, num_bytes, ceilings)


def _decode(sizes: Sizes, lengths: Sequence[int], dtype: torch.dtype, *, shared: int = 0) -> tuple[float, float, float]:
    lengths = [max(2, sizes.tokens(length)) for length in lengths[: sizes.sequences(len(lengths))]]
    cache, batch = Cache(sizes, lengths, dtype, shared=shared), len(lengths)
    context = torch.tensor(lengths, dtype=torch.int32, device=device_of())
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device_of())
    workspace = DecodeWorkspace.allocate(
        max_seqs=batch,
        max_query_len=1,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        block_size=sizes.block_size,
        kv_dtype=dtype,
        device=device_of(),
    )
    q, out = sizes.randn(batch, sizes.heads, sizes.head_dim), sizes.empty(batch, sizes.heads, sizes.head_dim)

    def run() -> None:
        decode_attention(
            q,
            cache.pool,
            cache.tables,
            context,
            starts,
            workspace,
            out,
            scale=sizes.head_dim**-0.5,
            kv_scale=cache.kv_scale,
        )

    plan_us = median_us([lambda: plan_decode(context, starts, workspace)])
    us = median_us([run])
    check("decode_attention", out)
    return us, plan_us, cache.num_bytes + 2 * q.numel() * q.element_size()


def prefill_cases(sizes: Sizes, ceilings: Ceilings) -> Iterator[Result]:
    rng = random.Random(1)
    packed = [rng.randint(64, 2048) for _ in range(32)]
    loads = {
        "8k": ([8192], [8192], 0.50),
        "2k after 30k": ([2048], [30 * 1024 + 2048], 0.45),
        "32 of 64 to 2048": (packed, packed, 0.30),
    }
    for name, (queries, contexts, bound) in loads.items():
        us, flops = _prefill(sizes, queries, contexts, sizes.dtype)
        yield Result.multiplied(f"prefill attention {name}", us, flops, ceilings, bound)
        if name == "8k":
            yield from _against_torch(sizes, us, flops, ceilings)
    if not sizes.smoke:
        us, flops = _prefill(sizes, [8192], [8192], FP8)
        yield Result.multiplied("prefill attention fp8 8k", us, flops, ceilings)
        for size in BLOCK_SIZES:
            us, flops = _prefill(replace(sizes, block_size=size), [8192], [8192], sizes.dtype)
            yield Result.multiplied(f"prefill attention 8k, blocks of {size}", us, flops, ceilings)


def _prefill(sizes: Sizes, queries: Sequence[int], contexts: Sequence[int], dtype: torch.dtype) -> tuple[float, float]:
    few = sizes.sequences(len(queries))
    queries = [max(1, sizes.tokens(count)) for count in queries[:few]]
    contexts = [max(query, sizes.tokens(count)) for query, count in zip(queries, contexts[:few], strict=True)]
    cache, count = Cache(sizes, contexts, dtype), sum(queries)
    plan = plan_prefill(queries, contexts, cache.tables, cache.pool, num_heads=sizes.heads)
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    q = sizes.randn(count, width)[:, : sizes.heads * sizes.head_dim].view(count, sizes.heads, sizes.head_dim)
    out = sizes.empty(count, sizes.heads, sizes.head_dim)
    scale = sizes.head_dim**-0.5
    us = median_us([lambda: prefill_attention(q, cache.pool, plan, out, scale=scale, kv_scale=cache.kv_scale)])
    check("prefill_attention", out)
    # a prompt from its start: 4 S^2 D H / 2, as flash attention is reported; a chunk: what it sees
    seen = sum(
        query * query / 2 if query == context else query * (context - query) + query * query / 2
        for query, context in zip(queries, contexts, strict=True)
    )
    return us, 4 * seen * sizes.head_dim * sizes.heads


def _against_torch(sizes: Sizes, us: float, flops: float, ceilings: Ceilings) -> Iterator[Result]:
    """torch's own kernels on contiguous K and V; and FlashInfer's where it is installed."""
    if not torch.cuda.is_available():
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q = sizes.randn(1, sizes.heads, 8192, sizes.head_dim)
    k, v = (sizes.randn(1, sizes.kv_heads, 8192, sizes.head_dim) for _ in range(2))
    # where a backend takes no grouped heads, they are laid out for it beforehand
    group = sizes.heads // sizes.kv_heads
    expanded = [tensor.repeat_interleave(group, dim=1) for tensor in (k, v)]
    for backend, bound in ((SDPBackend.FLASH_ATTENTION, 1.0), (SDPBackend.CUDNN_ATTENTION, None)):
        name, errors = backend.name.lower(), []
        for given, grouped in (((k, v), True), (expanded, False)):
            attend = partial(scaled_dot_product_attention, q, *given, is_causal=True, enable_gqa=grouped)
            try:
                with sdpa_kernel(backend):
                    theirs = median_us([attend], graph=False)
            except RuntimeError as error:
                errors.append(str(error).splitlines()[0])
                continue
            share = flops / (theirs * 1e-6) / ceilings.matrix
            note = f"theirs {theirs:.0f} us, {share:.2f} of the matrix rate" + ("" if grouped else ", heads repeated")
            yield Result(
                name=f"prefill attention 8k over {name}", us=us, kind="ratio", value=theirs / us, bound=bound, note=note
            )
            break
        else:
            yield Result(name=f"torch {name} 8k", us=0.0, kind="ratio", value=0.0, note=f"not there: {errors[0]}")
    yield from _flashinfer(us, q, k, v)


def _flashinfer(us: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Result]:
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]
    try:
        import flashinfer

        attend = partial(flashinfer.single_prefill_with_kv_cache, *rows, causal=True)
        theirs = median_us([attend], graph=False)
    except ImportError:
        return
    except Exception as error:  # noqa: BLE001 -- it compiles at its first call, and not everywhere can it
        note = f"not there: {' '.join(str(error).split())[:200]}"
        yield Result(name="flashinfer 8k", us=0.0, kind="ratio", value=0.0, note=note)
        return
    yield Result(name="prefill attention 8k over flashinfer", us=us, kind="ratio", value=theirs / us)
