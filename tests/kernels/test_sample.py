"""Sampling: the bits, the filters and the draw equal the plain reference, whatever shares the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.sample import (
    DrawRow,
    GumbelBits,
    allowed_tokens,
    allowed_words,
    gumbel,
    keep_candidates,
    philox4x64,
    sample,
    sample_reference,
    sample_with_logprobs,
)
from biphase.kernels.sample.noise import MAX_NOISE, least_word
from biphase.kernels.sample.torch_cpu import _loudest

ALL = (1 << 64) - 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # known answers of Random123 (kat_vectors, philox4x64, 10 rounds)
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (ALL, ALL, ALL, ALL),
            (ALL, ALL),
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_reference_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x64(counter, key) == expected


@pytest.mark.parametrize(
    ("seed", "branch", "position"), [(0, 0, 0), (ALL, 0, 0), (7, 3, 1000), (1 << 40, (1 << 32) - 1, 0), (5, 0, 8191)]
)
def test_words_are_philox_of_token_branch_and_position(seed: int, branch: int, position: int) -> None:
    expected = [philox4x64((token >> 2, branch, position, 0), (seed, 0))[token & 3] for token in range(203)]
    bits = GumbelBits(seed=seed, branch=branch, position=position)
    assert bits.first(203).tolist() == expected
    some = np.array([0, 1, 5, 6, 7, 100, 202])
    assert bits.of(some).tolist() == [expected[token] for token in some]
    assert bits.first(10).tolist() == expected[:10]
    far = np.array([3, 70_001, 70_003, 1_200_000])
    assert bits.of(far).tolist() == [philox4x64((t >> 2, branch, position, 0), (seed, 0))[t & 3] for t in far.tolist()]
    assert bits.of(np.array([], dtype=np.int64)).tolist() == []


def test_noise_is_finite_rises_with_the_word_and_is_gumbel() -> None:
    ends = gumbel(np.array([0, ALL], dtype=np.uint64))
    assert np.isfinite(ends).all()
    assert ends[0] < -2.8
    assert 16 < ends[1] <= MAX_NOISE
    noise = gumbel(GumbelBits(seed=1, branch=0, position=0).first(400_000))
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for bound in (-2.0, 0.0, 3.0, 9.0):
        word = least_word(bound)
        assert gumbel(np.array([max(0, word - (1 << 41))], dtype=np.uint64))[0] < bound


def ranked_reference(z: np.ndarray, top_k: int, top_p: float, min_p: float) -> list[int]:
    order = sorted(range(len(z)), key=lambda token: (-z[token], token))[: top_k or len(z)]
    if top_p < 1:
        mass = np.exp(z[order].astype(np.float64))
        before = np.cumsum(mass) - mass
        order = [token for i, token in enumerate(order) if i == 0 or before[i] < top_p * mass.sum()]
    return sorted(token for token in order if min_p == 0 or z[token] >= math.log(min_p))


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0], ids=["equal", "flat", "usual", "peaked"])
@pytest.mark.parametrize("size", [1, 63, 5000])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.0001, 0.0), (0, 1.0, 0.1), (40, 0.5, 0.0), (2000, 0.97, 0.01)],
)
def test_filters_keep_what_a_full_sort_keeps(spread: float, size: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(size).normal(0, spread, size).round(1).astype(np.float32)  # rounding makes ties
    z = logits - logits.max()
    kept = keep_candidates(z, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = ranked_reference(z, top_k, top_p, min_p)
    if kept is None:
        kept = np.arange(size)
    if top_p < 1 and spread < 3:
        # sums of many equal masses in another order may differ by one token at the threshold
        assert abs(len(kept) - len(expected)) <= 1
        assert kept.tolist()[: len(expected) - 1] == expected[: len(kept)][: len(expected) - 1] or spread > 0
    else:
        assert kept.tolist() == expected


def test_among_equals_the_lowest_ids_are_kept() -> None:
    z = np.zeros(6, dtype=np.float32)
    two = keep_candidates(z, top_k=2, top_p=1.0, min_p=0.0)
    half = keep_candidates(z, top_k=0, top_p=0.5, min_p=0.0)
    assert two is not None and two.tolist() == [0, 1]
    assert half is not None and half.tolist() == [0, 1, 2]
    assert sample(torch.tensor([[1.0, 3.0, 3.0]]), [DrawRow()]) == [1]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, ALL),
    position=st.integers(0, 100_000),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 5, 600]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    spread=st.sampled_from([0.5, 3.0, 10.0]),
    forbid=st.booleans(),
)
def test_draws_equal_the_reference(
    seed: int,
    position: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    spread: float,
    forbid: bool,
) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, 700).astype(np.float32)
    forbid_ids = tuple(np.argsort(-logits)[:2].tolist()) if forbid else ()
    row = DrawRow(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        branch=1,
        position=position,
        forbid_ids=forbid_ids,
    )
    expected = sample_reference(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        branch=1,
        position=position,
        forbid_ids=forbid_ids,
    )
    others = [DrawRow(temperature=1.0, seed=9), DrawRow()]
    noise = torch.randn(2, 700)
    alone = sample(torch.from_numpy(logits.copy())[None], [row])
    shared = sample(torch.cat((noise, torch.from_numpy(logits.copy())[None])), [*others, row])
    assert alone == [expected]
    assert shared[-1:] == [expected]
    assert not {expected} & set(forbid_ids)


@pytest.mark.parametrize("spread", [0.2, 3.0, 30.0], ids=["flat", "usual", "peaked"])
def test_pruning_never_loses_the_winner(spread: float) -> None:
    rng = np.random.default_rng(4)
    for position in range(200):
        z = rng.normal(0, spread, 3001).astype(np.float32)
        z -= z.max()
        words = GumbelBits(seed=11, branch=0, position=position).first(3001)
        assert _loudest(z, words) == int(np.argmax(z + gumbel(words)))


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    count = 20_000
    rows = [DrawRow(temperature=1.0, seed=5, position=i) for i in range(count)]
    drawn = np.bincount(sample(logits.repeat(count, 1), rows), minlength=5) / count
    expected = torch.softmax(logits, dim=0).numpy()
    assert np.abs(drawn - expected).max() < 4 * math.sqrt(0.25 / count)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_edited_draws_equal_the_reference(data: st.DataObject) -> None:
    tokens = st.integers(0, 299)
    options = {
        "temperature": data.draw(st.sampled_from([0.0, 1.0])),
        "seed": data.draw(st.integers(0, ALL)),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3, 0.7])),
        "frequency_penalty": data.draw(st.sampled_from([0.0, 0.4, -0.5])),
        "presence_penalty": data.draw(st.sampled_from([0.0, 1.1])),
        "prompt_ids": data.draw(st.lists(tokens, max_size=40)),
        "output_ids": data.draw(st.lists(tokens, max_size=40)),
        "logit_bias": tuple(data.draw(st.dictionaries(tokens, st.floats(-5, 5, width=32), max_size=4)).items()),
        "forbid_ids": tuple(data.draw(st.sets(tokens, max_size=3))),
    }
    allowed = data.draw(st.none() | st.sets(tokens, min_size=5))
    logits = np.random.default_rng(data.draw(st.integers(0, 99))).normal(0, 1.5, 300).astype(np.float32)
    expected = sample_reference(
        logits,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        branch=0,
        position=2,
        allowed_ids=sorted(allowed or range(300)),
        **options,
    )
    mask = None if not allowed else allowed_words(np.array(sorted(allowed)), 300)
    row = DrawRow(position=2, allowed=mask, **options)
    assert sample(torch.from_numpy(logits.copy())[None], [row]) == [expected]


def test_penalties_are_the_published_ones() -> None:
    def edited(**options: object) -> list[float]:
        logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
        sample(logits, [DrawRow(prompt_ids=[0], output_ids=[1, 1, 2], **options)])  # type: ignore[arg-type]
        return logits[0].tolist()

    assert edited() == [2.0, -2.0, 1.0, 0.0]
    assert edited(repetition_penalty=2.0) == [1.0, -4.0, 0.5, 0.0]
    assert edited(frequency_penalty=0.5) == [2.0, -3.0, 0.5, 0.0]
    assert edited(presence_penalty=0.5) == [2.0, -2.5, 0.5, 0.0]
    assert edited(repetition_penalty=2.0, logit_bias=((0, 8.0),)) == [9.0, -4.0, 0.5, 0.0]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_a_bitmask_allows_what_it_was_made_of(vocab: int) -> None:
    ids = np.random.default_rng(vocab).permutation(vocab)[: -(-vocab // 2)]
    words = allowed_words(ids, vocab)
    assert words.dtype == np.int32 and len(words) == -(-vocab // 32)
    assert np.flatnonzero(allowed_tokens(words, vocab)).tolist() == sorted(ids.tolist())
    assert all(words[i // 32] >> (i % 32) & 1 for i in ids.tolist())


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.log_softmax(logits, dim=-1)
    rows = [
        DrawRow(temperature=0.5, top_k=1, forbid_ids=(1,), logprobs=3),
        DrawRow(logprobs=0, logit_bias=((3, 1.0),)),
        DrawRow(),
    ]
    first, second, third = sample_with_logprobs(logits, rows)
    assert (first.token_id, second.token_id, third.token_id) == (2, 3, 0)
    assert [token for token, _ in first.top] == [1, 2, 0]
    assert [value for _, value in first.top] == pytest.approx(expected[0, [1, 2, 0]].tolist())
    assert first.logprob == pytest.approx(float(expected[0, 2]))
    assert second.logprob == pytest.approx(-math.log(5)) and second.top == ()
    assert third.logprob is None
    (many,) = sample_with_logprobs(torch.zeros(1, 3), [DrawRow(logprobs=20)])
    assert [token for token, _ in many.top] == [0, 1, 2]
