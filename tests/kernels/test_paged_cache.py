"""The caches that kernel tests read: what is where, and that all else is NaN."""

import pytest
import torch
from support.paged_cache import FP8_LIMIT, assert_near, poison, poisoned_pool, write_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_tokens_come_back_and_all_else_is_nan(dtype: torch.dtype) -> None:
    lengths = [5, 0, 16, 33]
    keys, values = ([torch.randn(n, 2, 8).clamp(-4, 4) for n in lengths] for _ in range(2))
    scale = torch.rand(2, 2) * 0.01 + 4 / FP8_LIMIT if dtype.itemsize == 1 else None
    cache = poisoned_pool(keys, values, block_size=16, dtype=dtype, kv_scale=scale, reserved_tokens=1)
    assert cache.pool.shape == (1 + 1 + 2 + 3 + 3, 2, 2, 16, 8)
    assert cache.context_lens.tolist() == lengths
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        for got, want in zip(cache.gathered(row), (key, value), strict=True):
            assert_near(got, want, dtype=dtype, units=1)
    assert int(cache.pool.float().isfinite().sum()) == 2 * 2 * 8 * sum(lengths)
    assert cache.gathered(2, 17)[0][16].isnan().all()
    assert len({*cache.block_tables[3].tolist()}) == 3 and len({*cache.block_tables[1].tolist()}) == 2


def test_appended_tokens_land_in_reserved_slots() -> None:
    cache = poisoned_pool([torch.randn(15, 1, 4)], [torch.randn(15, 1, 4)], block_size=16, reserved_tokens=2)
    slots = cache.slots(0, [15, -1, 16])
    assert slots[1] == -1 and slots[0] % 16 == 15 and slots[2] % 16 == 0
    keys, values = torch.randn(2, 3, 1, 4)
    write_tokens(cache, slots, keys, values)
    assert torch.equal(cache.gathered(0, 17)[0][15:], keys[[0, 2]])
    assert torch.equal(cache.gathered(0, 17)[1][15:], values[[0, 2]])


def test_near_is_relative_to_the_row_and_nan_fails() -> None:
    want = torch.tensor([[1.0, 1e-9], [100.0, 0.0]])
    assert_near(want + torch.tensor([[1e-7, 1e-7], [1e-5, 1e-5]]), want)
    with pytest.raises(AssertionError, match=r"at \[0, 1\]: 1e-05, expected 1e-09"):
        assert_near(torch.tensor([[1.0, 1e-5], [100.0, 0.0]]), want)
    with pytest.raises(AssertionError, match="nan"):
        assert_near(poison(torch.empty(2, 2)), want)
