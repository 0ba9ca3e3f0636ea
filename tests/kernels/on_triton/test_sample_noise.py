"""The noise of a draw on the device: the CPU's words, bit for bit, and its float32 noise."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from biphase.kernels.sample import GumbelBits, gumbel, philox4x64
from biphase.kernels.sample.triton_noise import gumbel_of, gumbel_tile, philox_words

ALL = (1 << 64) - 1
TILE = 64


@triton.jit
def words_kernel(inputs_ptr, words_ptr, noise_ptr, first_token, TILE: tl.constexpr):
    seed = tl.load(inputs_ptr).to(tl.uint64, bitcast=True)
    branch = tl.load(inputs_ptr + 1).to(tl.uint64, bitcast=True)
    position = tl.load(inputs_ptr + 2).to(tl.uint64, bitcast=True)
    quads = (first_token >> 2).to(tl.uint64) + tl.arange(0, TILE // 4).to(tl.uint64)
    c0, c1, c2, c3 = philox_words(seed, branch, position, quads)
    at = words_ptr + 4 * tl.arange(0, TILE // 4)
    tl.store(at, c0.to(tl.int64, bitcast=True))
    tl.store(at + 1, c1.to(tl.int64, bitcast=True))
    tl.store(at + 2, c2.to(tl.int64, bitcast=True))
    tl.store(at + 3, c3.to(tl.int64, bitcast=True))
    tl.store(noise_ptr + tl.arange(0, TILE), gumbel_tile(seed, branch, position, first_token, TILE))


@triton.jit
def noise_kernel(noise_ptr, TILE: tl.constexpr):
    bits = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(noise_ptr + bits, gumbel_of(bits))


@pytest.mark.parametrize(
    ("seed", "branch", "position", "first_token"),
    [
        (0, 0, 0, 0),
        (ALL, (1 << 32) - 1, 131_071, 151_872),
        (0x452821E638D01377, 0x13198A2E03707344, 0xA4093822299F31D0, 1_200_000),
        (7, 3, 1000, 64),
    ],
)
def test_words_and_noise_are_the_cpus(
    device: torch.device, seed: int, branch: int, position: int, first_token: int
) -> None:
    inputs = torch.from_numpy(np.array([seed, branch, position], dtype=np.uint64).view(np.int64)).to(device)
    words = torch.zeros(TILE, dtype=torch.int64, device=device)
    noise = torch.zeros(TILE, device=device)
    words_kernel[(1,)](inputs, words, noise, first_token, TILE=TILE)
    tokens = np.arange(first_token, first_token + TILE)
    got = words.cpu().numpy().view(np.uint64)
    assert got.tolist() == [philox4x64((t >> 2, branch, position, 0), (seed, 0))[t & 3] for t in tokens.tolist()]
    by_numpy = GumbelBits(seed=seed, branch=branch, position=position).of(tokens)
    assert np.array_equal(got, by_numpy)
    assert_within_ulps(noise.cpu().numpy(), gumbel(by_numpy))


def test_the_noise_of_every_word_is_the_cpus(device: torch.device) -> None:
    """All 2^23 values that noise can take."""
    count, tile = 1 << 23, 1 << 16
    noise = torch.zeros(count, device=device)
    noise_kernel[(count // tile,)](noise, TILE=tile, num_warps=8)
    by_cpu = gumbel(np.arange(count, dtype=np.uint64) << np.uint64(41))
    assert_within_ulps(noise.cpu().numpy(), by_cpu)
    u = (np.arange(count) + 0.5) / count
    assert_within_ulps(by_cpu, (-np.log(-np.log(u))).astype(np.float32))


def assert_within_ulps(noise: np.ndarray, expected: np.ndarray, ulps: int = 4) -> None:
    """Units in the last place of the noise or, where that is below 1, of 1: z, to which it is added, is no finer, and
    near zero the outer logarithm magnifies what the inner one rounds."""
    unit = np.spacing(np.maximum(np.abs(expected), np.float32(1.0)))
    assert (np.abs(noise - expected) / unit).max() <= ulps
