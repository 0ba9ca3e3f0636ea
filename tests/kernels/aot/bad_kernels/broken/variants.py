"""Launches that bench/aot.py must object to, each for one reason, and one that it must not."""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import target_of
from biphase.kernels.gpu.variant import Variant


@triton.jit
def copy_kernel(x_ptr, y_ptr, row_size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < row_size), mask=i < row_size)


@triton.jit(do_not_specialize=["n"])
def product_kernel(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, k, column = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, n, K):
        a = tl.load(a_ptr + m[:, None] * 4096 + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * 4096 + column[None, :])
        sums = tl.dot(a, b, sums)
    tl.store(c_ptr + m[:, None] * N + column[None, :], sums)


@triton.jit
def fill_kernel(x_ptr, num_tokens, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 1.0, mask=i < num_tokens)


@triton.jit
def share_of_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All of x is held until its sum is known."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x / tl.sum(x))


def variants() -> list[Variant]:
    product = partial(_product, 1024, 64)
    wide, tall = frozenset({"async_loads", "mma_wide"}), frozenset({"wide_loads"})
    return [
        _variant("good", product, traits=wide, other_step=partial(_product, 1, 64)),
        _variant("good copy", partial(_copy, 4096), traits=tall, other_step=partial(_copy, 64)),
        _variant("spills", _share_of_sum),
        _variant("too much shared memory", partial(_product, 1024, 64, K=256, num_stages=6)),
        _variant("not refused", product, min_capability=103),
        _variant("refused", partial(_refuses, "the kernel needs a GPU of capability 10.3"), min_capability=103),
        _variant("refused otherwise", partial(_refuses, "no"), min_capability=103),
        _variant("narrow", partial(_copy, 4097), traits=tall),
        _variant("not asynchronous", partial(_copy, 4096), traits=frozenset({"async_loads", "mma_sync"})),
        _variant("compiles again", partial(_copy, 4096), other_step=partial(_copy, 1)),
        _variant("specialised", _fill),
        _variant("does not compile", partial(_product, 1024, 48)),
        _variant("launches nothing", lambda: None),
    ]


def _variant(
    name: str,
    run: Callable[[], None],
    *,
    traits: frozenset[str] = frozenset(),
    min_capability: int = 80,
    other_step: Callable[[], None] | None = None,
) -> Variant:
    return Variant(name=name, run=run, quick=True, traits=traits, min_capability=min_capability, other_step=other_step)


def _copy(n: int) -> None:
    x = torch.empty(n, device="meta")
    launch(copy_kernel, (1,), x, x, n, BLOCK=1024, num_warps=4)


def _fill() -> None:
    launch(fill_kernel, (1,), torch.empty(64, device="meta"), 64, BLOCK=64)


def _share_of_sum() -> None:
    x = torch.empty(16_384, device="meta")
    launch(share_of_sum_kernel, (1,), x, x, BLOCK=16_384, num_warps=1)


def _product(n: int, width: int, K: int = 64, num_stages: int = 3) -> None:
    a, b, c = (torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta") for _ in range(3))
    launch(
        product_kernel, (1,), a, b, c, n, M=width, N=width, K=K, num_stages=num_stages
    )  # fmt: skip


def _refuses(message: str) -> None:
    assert target_of(torch.device("meta")).capability < 103
    raise ValueError(message)
