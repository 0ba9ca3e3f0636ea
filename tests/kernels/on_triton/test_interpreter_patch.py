"""The interpreter's patch against torch: conversions, arithmetic and products in bfloat16 and fp8, and what was made fast.

On a GPU the same kernels run on the hardware, where the e4m3 cast saturates; nothing past 448 is cast there.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, *FP8)
on_gpu = torch.cuda.is_available()


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x.to(tl.float32).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1.0)
    y = tl.load(y_ptr + i, mask=i < n, other=1.0)
    tl.store(out_ptr + i, x + y, mask=i < n)
    tl.store(out_ptr + n + i, x * y, mask=i < n)
    tl.store(out_ptr + 2 * n + i, x - y * 0.5, mask=i < n)
    tl.store(out_ptr + 3 * n + i, tl.maximum(x, y), mask=i < n)
    tl.store(out_ptr + 4 * n + i, tl.where(x < y, -x, tl.abs(y)), mask=i < n)
    tl.store(out_ptr + 5 * n + i, i.to(x.dtype) * 3, mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@triton.jit
def umulhi_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.umulhi(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@triton.jit
def larger(a_value, a_index, b_value, b_index):
    """The larger value, on a tie the smaller index."""
    keep = (a_value > b_value) | ((a_value == b_value) & (a_index < b_index))
    return tl.where(keep, a_value, b_value), tl.where(keep, a_index, b_index)


@triton.jit
def take_xor(a, b):
    return a ^ b


@triton.jit
def compose(a_scale, a_shift, b_scale, b_shift):
    """First x -> a_scale x + a_shift, then b: associative, not commutative."""
    return a_scale * b_scale, a_shift * b_scale + b_shift


@triton.jit
def reduce_kernel(x_ptr, value_ptr, index_ptr, xor_ptr, scan_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = rows[:, None] * COLUMNS + columns[None, :]
    x = tl.load(x_ptr + at)
    value, index = tl.reduce((x, columns[None, :] + tl.zeros_like(at)), 1, larger)
    tl.store(value_ptr + rows, value)
    tl.store(index_ptr + rows, index)
    tl.store(xor_ptr + columns, tl.reduce(x.to(tl.int32), 0, take_xor))
    scale, shift = tl.associative_scan((tl.full(at.shape, 0.5, tl.float32), x), 1, compose)
    tl.store(scan_ptr + at, shift + 0 * scale)


@triton.jit
def odd_corners_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bits = tl.load(x_ptr + i)
    bits = ~bits
    for step in range(n):
        bits += step
    infinite = tl.full((BLOCK,), float("-inf"), tl.float32)
    nothing = tl.exp2(infinite - infinite)  # NaN, and no warning
    tl.store(out_ptr + i, tl.where((nothing > 0) | (nothing <= 0), 0, bits).to(tl.uint32))


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, the sign of zero included; any NaN equals any other."""
    actual, expected = actual.cpu().float(), expected.cpu().float()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def awkward_values(dtype: torch.dtype) -> torch.Tensor:
    """float32: random bits over all exponents, and around each value of ``dtype``'s and between each two of them."""
    generator = torch.Generator().manual_seed(1)
    random_bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32).view(torch.float32)
    width = 8 if dtype.itemsize == 1 else 16
    codes = torch.arange(2**width) if width == 8 else torch.randint(0, 2**16, (4000,), generator=generator)
    positive = codes.to(torch.uint8 if width == 8 else torch.uint16).view(dtype).float()
    positive = positive[positive.isfinite()].sort().values
    ties = (positive[1:].double() + positive[:-1].double()).div(2).float()
    if width == 16:  # random codes are not neighbours: half a unit of the last place beyond each
        ties = (positive.view(torch.int32) + (1 << 15)).view(torch.float32)
        ties = ties[ties.isfinite()]
    zero = torch.zeros(())
    near = [torch.nextafter(ties, zero), torch.nextafter(ties, zero + math.inf)]
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 448, 464, 464.01, 480, 57344, 61440, -31.96, 1e-45]
    )
    values = torch.cat([random_bits, random_bits.clamp(-500, 500), positive, ties, *near, special])
    return values.clamp(-448, 448) if on_gpu and width == 8 else values


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_fp8_codes_widen_and_come_back(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    values = codes.float()
    assert_same(convert(codes.to(device), wide), values.to(wide))
    if on_gpu:
        codes = codes[values.isfinite()]  # hardware saturates infinity
    back = convert(codes.float().to(wide).to(device), dtype).cpu()
    finite = ~codes.float().isnan()
    assert torch.equal(back.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])
    assert back.float()[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FP8], ids=str)
def test_float32_is_rounded_to_nearest_even(device: torch.device, dtype: torch.dtype) -> None:
    values = awkward_values(dtype)
    if dtype == torch.float8_e4m3fn:
        values = values[~(values.abs() > 464)]
    assert_same(convert(values.to(device), dtype), values.to(dtype))


@pytest.mark.skipif(on_gpu, reason="hardware saturates")
def test_a_forgotten_clamp_is_found(device: torch.device) -> None:
    """Releases of torch differ here."""
    values = torch.tensor([448.0, 464, 464.01, -1e9, math.inf, -math.inf, math.nan], device=device)
    assert_same(convert(values, torch.float8_e4m3fn), torch.tensor([448.0, 448, *[math.nan] * 5]))


def test_all_bfloat16_codes(device: torch.device) -> None:
    codes = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    assert_same(convert(codes.to(device), torch.float32), codes.float())
    finite = codes[~codes.isnan()]
    assert torch.equal(convert(finite.to(device), torch.bfloat16).cpu().view(torch.int16), finite.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic_rounds_after_each_operation(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    n = 200
    x, y = torch.randn(2, n, generator=generator).to(dtype)
    out = torch.full((6, n), math.nan, dtype=dtype, device=device)
    arithmetic_kernel[(1,)](x.to(device), y.to(device), out, n, BLOCK=256)
    half = (y.float() * 0.5).to(dtype)
    expected = [
        x + y, x * y, x - half, torch.maximum(x, y), torch.where(x < y, -x, y.abs()), (torch.arange(n).to(dtype) * 3)
    ]  # fmt: skip
    for row, (got, want) in enumerate(zip(out, expected, strict=True)):
        if on_gpu:  # multiply and add may be fused there
            torch.testing.assert_close(got.cpu(), want)
        else:
            assert_same(got, want), row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_product_is_of_values_not_of_bits(device: torch.device, dtype: torch.dtype) -> None:
    if on_gpu and dtype.itemsize == 1 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    out = torch.full((32, 16), math.nan, device=device)
    dot_kernel[(1,)](a.to(device), b.to(device), out, M=32, N=16, K=64, PRECISION="ieee")
    torch.testing.assert_close(out.cpu(), a.float() @ b.float(), rtol=1e-3 if dtype.itemsize == 1 else 1e-5, atol=1e-4)


def test_float32_product_that_states_no_precision_is_tf32(device: torch.device) -> None:
    a, b = torch.randn(32, 64), torch.randn(64, 16)
    coarse, exact = torch.empty(2, 32, 16, device=device)
    dot_kernel[(1,)](a.to(device), b.to(device), coarse, M=32, N=16, K=64, PRECISION=None)
    dot_kernel[(1,)](a.to(device), b.to(device), exact, M=32, N=16, K=64, PRECISION="ieee")
    assert 1e-4 < (coarse - exact).abs().max() < 1e-1


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int32, np.int64])
def test_umulhi_is_the_high_half(device: torch.device, dtype: type) -> None:
    bits = 8 * np.dtype(dtype).itemsize
    random = np.random.default_rng(3)
    edges = [0, 1, 2 ** (bits // 2) - 1, 2 ** (bits // 2), 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
    a = random.integers(0, 2**bits, 1024, dtype=np.dtype(f"u{dtype().itemsize}"))
    b = random.integers(0, 2**bits, 1024, dtype=np.dtype(f"u{dtype().itemsize}"))
    a[:49], b[:49] = (np.array(pairs, a.dtype) for pairs in zip(*itertools.product(edges, edges), strict=True))
    if on_gpu and np.issubdtype(dtype, np.signedinteger):
        pytest.skip("signed operands are not this test's business on a GPU")
    tensors = [torch.from_numpy(x.view(dtype)).to(device) for x in (a, b, np.zeros_like(a))]
    umulhi_kernel[(1,)](*tensors, BLOCK=1024)
    expected = [(int(x) * int(y)) >> bits for x, y in zip(a, b, strict=True)]
    assert tensors[2].cpu().numpy().view(a.dtype).tolist() == expected


@pytest.mark.parametrize("shape", [(1, 1), (4, 16), (8, 128)])
def test_reductions_and_scans_of_any_function(device: torch.device, shape: tuple[int, int]) -> None:
    x = torch.randint(-9, 9, shape).float()
    rows, columns = shape
    value, index = torch.empty(rows, device=device), torch.empty(rows, dtype=torch.int32, device=device)
    xor, scan = torch.empty(columns, dtype=torch.int32, device=device), torch.empty(shape, device=device)
    reduce_kernel[(1,)](x.to(device), value, index, xor, scan, ROWS=rows, COLUMNS=columns)
    assert torch.equal(value.cpu(), x.max(1).values)
    assert torch.equal(index.cpu().long(), torch.tensor([row.tolist().index(row.max()) for row in x]))
    assert xor.cpu().tolist() == np.bitwise_xor.reduce(x.int().numpy(), axis=0).tolist()
    running, expected = torch.zeros(rows), []
    for column in x.T:
        running = running * 0.5 + column
        expected.append(running)
    torch.testing.assert_close(scan.cpu(), torch.stack(expected, 1))


def test_what_one_release_or_the_other_stumbles_over(device: torch.device) -> None:
    """~ on unsigned, a loop whose bound is an argument, invalid operations that numpy would warn of."""
    x = torch.arange(64).to(torch.int64).to(torch.uint32).to(device)
    out = torch.zeros_like(x)
    odd_corners_kernel[(1,)](x, out, 3, BLOCK=64)
    assert out.cpu().tolist() == [(2**32 - 1 - i + 3) % 2**32 for i in range(64)]
