"""Compiles one kernel with integers of every kind, and prints how many compilations were counted after each."""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import torch
import triton
import triton.language as tl
from aot_compile import NamedGpu
from triton.runtime.driver import driver

from biphase.kernels.gpu import compile_count
from biphase.kernels.gpu.launch import compiling_only, launch


def fill(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), n)


specialised_kernel = triton.jit(fill)
one_kernel = triton.jit(fill, do_not_specialize=["n"])


def counts(kernel: object, values: list[int]) -> list[int]:
    x, found = torch.empty(64, dtype=torch.int32, device="meta"), []
    for value in values:
        with compiling_only(lambda *_: None):
            launch(kernel, (1,), x, value, BLOCK=64)
        found.append(compile_count.num_compiled())
    return found


logging.basicConfig(stream=sys.stderr, format="%(message)s")
driver.set_active(NamedGpu(90))
compile_count.install()
compile_count.install()
specialised = counts(specialised_kernel, [16, 32, 17, 18, 1, 48, 1])
one = counts(one_kernel, [16, 17, 1, 32])
unsealed = compile_count.num_since_sealed()
compile_count.seal()
counts(one_kernel, [64, 5])
quiet = compile_count.num_since_sealed()
counts(one_kernel, [2**40])  # 64 bits are another version, whatever is not specialised
print(json.dumps([specialised, one, unsealed, quiet, compile_count.num_since_sealed()]))
