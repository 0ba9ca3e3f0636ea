"""Rope, cache write and both attentions equal their references: odd sizes, head groups, windows, scattered blocks."""

import random
from collections.abc import Sequence

import pytest
import torch

from biphase.kernels.decode_attention import decode_attention, decode_attention_reference, plan_decode, torch_cpu
from biphase.kernels.prefill_attention import plan_prefill, prefill_attention, prefill_attention_reference
from biphase.kernels.rope_and_cache import cache_rows, rope_and_cache, rope_and_cache_reference

HEADS = [(1, 1), (3, 3), (6, 2), (14, 2), (4, 1)]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def tables_for(lengths: Sequence[int], block_size: int, num_blocks: int) -> list[list[int]]:
    free = list(range(num_blocks))
    random.Random(1).shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in lengths]


def pool_of(num_blocks: int, kv_heads: int, block_size: int, dim: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(num_blocks, 2, kv_heads, block_size, dim)


def feature_major(q_NHD: torch.Tensor, kv_heads: int, padding: int) -> torch.Tensor:
    """``[K, G, D, N + padding]``, the padding NaN."""
    num_tokens, heads, dim = q_NHD.shape
    out = torch.full((heads, dim, num_tokens + padding), torch.nan)
    out[..., :num_tokens] = q_NHD.permute(1, 2, 0)
    return out.view(kv_heads, heads // kv_heads, dim, -1)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("group_bytes", [1, 4 << 20], ids=["groups of one", "one group"])
def test_decode_attention_equals_the_reference(
    heads: int, kv_heads: int, window: int | None, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_cpu, "_GROUP_BYTES", group_bytes)
    block_size, dim, lengths = 8, 20, [63, 33, 32, 9, 1]
    pool = pool_of(24, kv_heads, block_size, dim)
    tables = tables_for(lengths, block_size, 24)
    q_BHD = torch.randn(len(lengths), heads, dim)
    expected = decode_attention_reference(q_BHD, pool, tables, lengths, window)
    with torch.inference_mode():
        batch, scratch = plan_decode(
            tables,
            lengths,
            num_heads=heads,
            num_kv_heads=kv_heads,
            block_size=block_size,
            head_dim=dim,
            window=window,
            scratch=torch.empty(0),
        )
        scratch.fill_(torch.nan)
        out = torch.full((kv_heads, heads // kv_heads, dim, len(lengths) + 3), torch.nan)
        q = feature_major(q_BHD, kv_heads, 3)
        decode_attention(q, pool.view(-1, block_size * dim), batch, dim**-0.5, out)
    assert len(batch.groups) == (len(lengths) if group_bytes == 1 else 1)
    got = out.reshape(heads, dim, -1)[..., : len(lengths)].permute(2, 0, 1)
    assert relative_error(got, expected) < 1e-5
    assert out[..., len(lengths) :].isnan().all()


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 13, 200])
@pytest.mark.parametrize(("position", "count"), [(0, 2), (0, 63), (1, 30), (32, 31), (45, 2)])
def test_prefill_attention_equals_the_reference(
    heads: int, kv_heads: int, window: int | None, position: int, count: int
) -> None:
    block_size, dim = 8, 16
    pool = pool_of(12, kv_heads, block_size, dim)
    (table,) = tables_for([position + count], block_size, 12)
    q_NHD = torch.randn(count, heads, dim)
    expected = prefill_attention_reference(q_NHD, pool, table, position, window)
    before = 2  # tokens of another sequence in the same step
    q = feature_major(torch.cat((torch.randn(before, heads, dim), q_NHD)), kv_heads, 1)
    fresh = torch.full((2 * kv_heads, before + count, dim), torch.nan)
    for n in range(count):
        block, offset = table[(position + n) // block_size], (position + n) % block_size
        fresh[:, before + n] = pool[block, :, :, offset].reshape(2 * kv_heads, dim)
    out = torch.full((kv_heads, heads // kv_heads, dim, before + count + 1), torch.nan)
    with torch.inference_mode():
        chunk = plan_prefill(
            table,
            start=before,
            position=position,
            count=count,
            num_kv_heads=kv_heads,
            block_size=block_size,
            window=window,
        )
        prefill_attention(q, fresh, pool.view(-1, block_size * dim), chunk, dim**-0.5, out)
    got = out.reshape(heads, dim, -1)[..., before : before + count].permute(2, 0, 1)
    assert relative_error(got, expected) < 1e-5
    assert out[..., :before].isnan().all() and out[..., before + count :].isnan().all()


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rotary", [16, 6], ids=["whole head", "part of a head"])
def test_rope_and_cache_equal_the_reference(heads: int, kv_heads: int, rotary: int) -> None:
    block_size, dim, padding = 4, 16, 2
    positions = [5, 0, 1, 2, 1000]
    places = [(3, 1), (0, 0), (0, 1), (0, 2), (5, 0)]
    frequencies = [10000.0 ** (-2 * i / rotary) for i in range(rotary // 2)]
    qkv = torch.randn((heads + 2 * kv_heads) * dim, len(positions) + padding)
    ours, theirs = qkv.clone(), qkv[:, : len(positions)].clone()
    pool, expected_pool = torch.zeros(6, 2, kv_heads, block_size, dim), torch.zeros(6, 2, kv_heads, block_size, dim)
    rope_and_cache_reference(theirs, frequencies, positions, places, expected_pool, heads)
    with torch.inference_mode():
        per_head = ours.view(heads + 2 * kv_heads, dim, -1)
        angles = torch.tensor(frequencies).unsqueeze(1) * torch.tensor([*positions, 0, 0]).float()
        rows = cache_rows(
            torch.tensor([block for block, _ in places]),
            torch.tensor([offset for _, offset in places]),
            kv_heads,
            block_size,
        )
        fresh = rope_and_cache(
            per_head[: heads + kv_heads, :rotary].unflatten(1, (2, rotary // 2)),
            per_head[heads:],
            angles.cos(),
            angles.sin(),
            pool.view(-1, dim),
            rows,
        )
    assert relative_error(ours[:, : len(positions)], theirs) < 1e-4  # angles of position 1000 in float32
    assert relative_error(pool, expected_pool) < 1e-4
    for n, (block, offset) in enumerate(places):
        assert torch.equal(fresh[:, n], pool[block, :, :, offset].reshape(2 * kv_heads, dim))
