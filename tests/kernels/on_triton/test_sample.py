"""The Triton sampler against the plain reference: tokens, scores and log-probabilities, whatever shares the launch."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biphase.kernels.gpu.target import AOT_TARGETS
from biphase.kernels.sample import DrawRow, allowed_words, buffers, sample_with_logprobs
from biphase.kernels.sample.buffers import SampleOut, SampleWorkspace, merge_shards
from biphase.kernels.sample.edits import edit
from biphase.kernels.sample.filters import keep_candidates, min_p_floor
from biphase.kernels.sample.params import SampleParams
from biphase.kernels.sample.reference import of_shard, rows_reference
from biphase.kernels.sample.triton_gpu import candidates, default, key, sample

_long = pytest.mark.long
_SMALL = {"TILE": 256, "splits": 3, "num_warps": 4}
_UNTOUCHED = -77


def logits_of(
    device: torch.device,
    rows: int,
    vocab: int,
    *,
    spread: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows further apart than their length, NaN between them."""
    padded = torch.full((rows, -(-vocab // 8) * 8 + 24), torch.nan, device=device, dtype=dtype)
    padded[:, :vocab] = (spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)
    return padded[:, :vocab]


def empty_out(rows: int, device: torch.device) -> SampleOut:
    out = SampleOut.allocate(rows, device)
    for tensor in (out.token_ids, out.top_ids):
        tensor.fill_(_UNTOUCHED)
    for tensor in (out.scores, out.logprobs, out.top_logprobs):
        tensor.fill_(torch.nan)
    return out


def draw(logits: torch.Tensor, rows: list[DrawRow], *, spare: int = 1, **options: Any) -> SampleOut:
    """Drawn, and checked against the reference; there are ``spare`` more rows than were filled."""
    device, vocab, max_rows = logits.device, logits.shape[1], len(rows) + spare
    params = SampleParams(max_rows=max_rows, vocab_size=vocab, device=device, extra_words=1 << 14)
    workspace = SampleWorkspace(max_rows=max_rows, vocab_size=vocab, device=device)
    workspace.edits.fill_(torch.nan)
    params.fill(rows, options.pop("late_rows", None))
    chosen = options.pop("settings", _SMALL)
    out, expected = empty_out(max_rows, device), empty_out(max_rows, device)
    kept = logits.clone()
    sample(logits, params, out, workspace, settings=chosen, **options)
    rows_reference(logits, params, expected, workspace, **options)
    torch.testing.assert_close(logits, kept, rtol=0, atol=0, equal_nan=True)
    assert not workspace.histogram.any() and not workspace.split_histogram.any() and not workspace.state[:, 0].any()
    torch.testing.assert_close(out.scores, expected.scores, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(out.top_logprobs, expected.top_logprobs, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert out.token_ids.tolist() == expected.token_ids.tolist()
    assert out.top_ids.tolist() == expected.top_ids.tolist()
    check_steps(logits, params, workspace, options.get("late_ids"), options.get("vocab_start", 0))
    return out


def check_steps(
    logits: torch.Tensor, params: SampleParams, workspace: SampleWorkspace, late_ids: torch.Tensor | None, start: int
) -> None:
    """Edited logits equal the CPU's bit for bit, and the thresholds leave the tokens that the CPU's filters leave:
    few draws would tell."""
    vocab = logits.shape[1]
    raw, peaks = logits.float().cpu().numpy(), workspace.row_max.cpu().numpy()
    for index, row in enumerate(params.rows(late_ids)[: len(raw)]):
        if row is None:
            continue
        x = np.where(np.isnan(raw[index]), np.float32(-np.inf), raw[index])
        if row.edited:
            edit(x, of_shard(row, start, vocab))
            assert np.array_equal(workspace.edits[index, :vocab].cpu().numpy(), x)
        if row.temperature > 0 and (0 < row.top_k < vocab or row.top_p < 1):
            z = (x - peaks[index]) / np.float32(row.temperature)
            expected = keep_candidates(z, top_k=row.top_k, top_p=row.top_p, min_p=0.0)
            assert expected is not None
            limit, need = workspace.state[index, 3:5].tolist()
            keys = z.view(np.int32) & 0x7FFFFFFF
            kept = np.flatnonzero((keys < limit) | (keys == limit) & (np.cumsum(keys == limit) <= need))
            # a GPU's exponential is not numpy's: where the mass ends on a token's edge, that token may differ
            assert len(np.setxor1d(kept, expected)) <= (1 if row.top_p < 1 and logits.is_cuda else 0)


def every_kind(vocab: int) -> list[DrawRow]:
    some = np.random.default_rng(0).permutation(vocab)
    edits: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.125,
        "prompt_ids": some[: vocab // 3],
        "output_ids": np.concatenate((some[vocab // 4 : vocab // 2], some[:9], some[:9], some[:3])).astype(np.int32),
        "logit_bias": ((int(some[0]), 4.0), (vocab - 1, -1.5)),
        "allowed": allowed_words(np.flatnonzero(np.arange(vocab) % 3), vocab),
        "forbid_ids": (int(some[3]), int(some[4])),
    }
    return [
        DrawRow(),
        DrawRow(temperature=1.0, seed=(1 << 64) - 1, branch=(1 << 32) - 1, position=100_000),
        DrawRow(temperature=0.5, top_k=20, seed=4, logprobs=20),
        DrawRow(temperature=1.5, top_p=0.7, seed=5, logprobs=0),
        DrawRow(temperature=1.0, min_p=0.05, seed=6, position=3),
        DrawRow(temperature=0.9, top_k=30, top_p=0.8, min_p=0.01, seed=7, logprobs=3, **edits),
        DrawRow(logprobs=5, **edits),
        DrawRow(temperature=0.6, top_k=5, seed=8),
        DrawRow(temperature=2.0, top_k=vocab // 2, top_p=0.999, seed=1, frequency_penalty=2.0, output_ids=[1, 1, 1]),
    ]


@pytest.mark.parametrize(
    ("vocab", "dtype", "spread"),
    [
        (1000, torch.bfloat16, 2.0),
        pytest.param(5000, torch.float32, 1.0, marks=_long),
        pytest.param(1, torch.float32, 1.0, marks=_long),
        pytest.param(63, torch.float16, 3.0, marks=_long),
        pytest.param(768, torch.float32, 0.0, marks=_long),
        pytest.param(1100, torch.bfloat16, 30.0, marks=_long),
        pytest.param(2049, torch.float32, 1e-6, marks=_long),
    ],
)
def test_every_kind_of_row_side_by_side(device: torch.device, vocab: int, dtype: torch.dtype, spread: float) -> None:
    rows = every_kind(vocab) if vocab > 60 else [DrawRow(), DrawRow(temperature=1.0, top_p=0.5, top_k=1, logprobs=20)]
    out = draw(logits_of(device, len(rows) + 1, vocab, spread=spread, dtype=dtype), rows)
    assert out.token_ids[-1] == _UNTOUCHED and out.top_logprobs[-1].isnan().all()


@pytest.mark.parametrize(
    ("rows", "vocab", "spread"),
    [
        ([DrawRow(temperature=1.0, top_k=k, seed=k) for k in (7, 300)], 500, 0.0),
        ([DrawRow(temperature=1.0, top_p=p, seed=3) for p in (0.0, 0.3)], 400, 0.0),
        ([DrawRow(temperature=1.0, top_k=100, top_p=p, seed=5) for p in (0.2,)], 400, 0.0),
        pytest.param([DrawRow(temperature=1.0, top_k=40, top_p=0.6, seed=s) for s in range(4)], 900, 0.5, marks=_long),
        pytest.param([DrawRow(temperature=0.01, top_k=500, seed=s) for s in range(3)], 900, 2.0, marks=_long),
        pytest.param([DrawRow(temperature=50.0, top_p=0.9999, seed=s) for s in range(3)], 900, 0.5, marks=_long),
    ],
    ids=["k of equals", "p of equals", "p of k equals", "p among k ties", "cold", "hot"],
)
def test_among_equals_the_lowest_ids_are_kept(
    device: torch.device, rows: list[DrawRow], vocab: int, spread: float
) -> None:
    logits = logits_of(device, len(rows), vocab, spread=spread).mul_(4).round_().div_(4)
    # many draws of each row, or the one token too many would not show
    many = [replace(row, position=position) for row in rows for position in range(2)]
    draw(torch.cat((logits.repeat_interleave(2, dim=0), logits[:1])), [*many, DrawRow()], spare=0)


def test_greedy_takes_the_lowest_of_equals_whatever_program_finds_it(device: torch.device) -> None:
    logits = torch.zeros(3, 1000, device=device)
    logits[1, 300:] = 2.5
    logits[2, [999, 700]] = 1.0
    for splits in (1, 2, 4):
        chosen = {**_SMALL, "splits": splits}
        out = draw(logits, [DrawRow()] * 3, spare=0, settings=chosen)
        assert out.token_ids.tolist() == [0, 300, 700]


def test_a_draw_depends_on_nothing_but_its_row(device: torch.device) -> None:
    vocab = 1000
    rows = every_kind(vocab)[1:6]
    logits = logits_of(device, len(rows), vocab)
    together = draw(logits, rows, spare=0)
    for settings_, chosen in (({"TILE": 512, "splits": 2, "num_warps": 4}, 4), ({**_SMALL, "splits": 1}, 1)):
        alone = draw(logits[chosen:][:1], rows[chosen:][:1], spare=0, settings=settings_)
        for name in ("token_ids", "scores", "top_ids"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[chosen])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[chosen], rtol=0, atol=0, equal_nan=True)


def test_groups_grow_with_the_vocabulary(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [buffers.group_size(vocab) for vocab in (1, 128_256, 151_936, 262_144, 1 << 20)] == [64, 64, 128, 128, 512]
    assert [buffers.num_groups(vocab) for vocab in (1, 64, 65, 128_256, 151_936)] == [1, 1, 2, 2048, 2048]
    monkeypatch.setattr(buffers, "MAX_GROUPS", 4)
    assert buffers.group_size(900) == 256
    draw(logits_of(device, 2, 900), [DrawRow(temperature=1.0, top_k=k, seed=k, logprobs=9) for k in (3, 5)])


def test_shards_of_the_vocabulary_draw_what_the_whole_draws(device: torch.device) -> None:
    vocab, cuts = 800, (0, 256, 576, 800)
    edits: dict[str, Any] = {"repetition_penalty": 1.5, "prompt_ids": [3, 300, 700], "logit_bias": ((599, 2.0),)}
    rows = [
        DrawRow(),
        *(DrawRow(temperature=1.0, seed=s) for s in range(3)),
        DrawRow(temperature=0.8, min_p=0.02, seed=9, forbid_ids=(2, 258, 799), **edits),
    ]
    logits = logits_of(device, len(rows), vocab)
    whole = draw(logits, rows, spare=0)
    edited = logits.cpu().numpy().copy()
    edit(edited[-1], rows[-1])
    peaks = torch.from_numpy(edited.max(axis=1)).to(device)

    def reduce_max(row_max: torch.Tensor) -> None:
        assert (row_max <= peaks).all()
        row_max.copy_(peaks)

    shards = [
        draw(logits[:, a:b], rows, spare=0, vocab_start=a, reduce_max=reduce_max) for a, b in itertools.pairwise(cuts)
    ]
    merged = merge_shards(torch.stack([s.scores for s in shards]), torch.stack([s.token_ids for s in shards]))
    assert merged.tolist() == whole.token_ids.tolist()
    assert torch.stack([s.scores for s in shards]).amax(dim=0).tolist() == whole.scores.tolist()


def test_a_token_drawn_but_not_yet_seen_by_the_host_counts(device: torch.device) -> None:
    vocab = 300
    logits = torch.zeros(3, vocab, device=device)
    logits[:, 7], logits[:, 8] = 2.0, 1.0
    late = torch.tensor([8, 7, 9], device=device)
    rows = [DrawRow(presence_penalty=1.5), DrawRow(presence_penalty=1.5), DrawRow(repetition_penalty=3.0)]
    out = draw(logits, rows, late_rows=[1, -1, 1], late_ids=late, spare=0)
    assert out.token_ids.tolist() == [8, 7, 8]
    assert draw(logits, rows[:1], late_rows=[0], late_ids=late, spare=2).token_ids.tolist()[0] == 7


def test_nan_and_forbidden_tokens_never_win(device: torch.device) -> None:
    vocab = 500
    logits = logits_of(device, 3, vocab)
    logits[:, 5:400:2] = torch.nan
    rows = [
        DrawRow(logprobs=3),
        DrawRow(temperature=1.0, top_k=490, seed=2),
        DrawRow(temperature=1.0, allowed=allowed_words(np.array([6, 7]), vocab), top_p=0.99, seed=1),
    ]
    out = draw(logits, rows, spare=0)
    assert not logits[torch.arange(3), out.token_ids].isnan().any()
    assert out.token_ids[2] == 6


def test_a_row_may_have_more_biases_than_a_program_has_lanes(device: torch.device) -> None:
    vocab = 600
    biases = tuple((token, token % 7 - 3.5) for token in range(vocab - 1, 0, -2))
    assert _SMALL["TILE"] < len(biases)
    draw(logits_of(device, 1, vocab), [DrawRow(logit_bias=biases)], spare=0)


def test_min_p_keeps_its_floor_and_nothing_below(device: torch.device) -> None:
    """Nearly every draw would be one of the many."""
    vocab, best, min_p = 500, 123, 0.9
    floor = min_p_floor(min_p)
    logits = torch.full((2, vocab), float(floor), device=device)
    logits[1] = float(np.nextafter(floor, np.float32(-np.inf)))
    logits[:, best] = 0.0
    out = draw(logits, [DrawRow(temperature=1.0, min_p=min_p, seed=s) for s in range(2)], spare=0)
    assert out.token_ids[0] != best and out.token_ids[1] == best


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_draws_equal_the_cpu_backend(device: torch.device, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([200, 513, 777]))
    tokens = st.integers(0, vocab - 1)
    rows = data.draw(
        st.lists(
            st.builds(
                DrawRow,
                temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 4.0]),
                top_k=st.sampled_from([0, 1, 5, 150, 1000]),
                top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
                min_p=st.sampled_from([0.0, 0.05]),
                seed=st.integers(0, (1 << 64) - 1),
                branch=st.integers(0, 100),
                position=st.integers(0, 100_000),
                forbid_ids=st.sets(tokens, max_size=3).map(tuple),
                repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
                frequency_penalty=st.sampled_from([0.0, 0.3, -0.5]),
                presence_penalty=st.sampled_from([0.0, 0.7]),
                prompt_ids=st.lists(tokens, max_size=30),
                output_ids=st.lists(tokens, max_size=30),
                logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, 0.5, 5.0]), max_size=3).map(
                    lambda bias: tuple(bias.items())
                ),
                logprobs=st.sampled_from([None, 0, 4]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    logits = logits_of(device, len(rows), vocab, spread=data.draw(st.sampled_from([0.5, 3.0])), seed=rows[0].seed % 99)
    out = draw(logits, rows, settings={"TILE": 256, "splits": data.draw(st.sampled_from([1, 2])), "num_warps": 4})
    by_cpu = sample_with_logprobs(logits.cpu().clone(), rows)
    drawn = out.drawn([row.logprobs for row in rows])
    assert [d.token_id for d in drawn] == [d.token_id for d in by_cpu]
    for ours, other in zip(drawn, by_cpu, strict=True):
        assert (ours.logprob is None) == (other.logprob is None)
        assert [token for token, _ in ours.top] == [token for token, _ in other.top]
        if ours.logprob is not None:
            assert [ours.logprob, *dict(ours.top).values()] == pytest.approx(
                [other.logprob, *dict(other.top).values()], abs=2e-6
            )


def test_rows_come_back_from_the_device_as_they_were_filled(device: torch.device) -> None:
    rows = every_kind(400)
    params = SampleParams(max_rows=len(rows) + 2, vocab_size=400, device=device, extra_words=4000)
    params.fill([DrawRow(temperature=1.0)] * len(rows))
    assert not params.has_filters
    params.fill(rows)
    assert params.has_filters
    back = params.rows()
    assert back[len(rows) :] == [None, None]
    for row, other in zip(rows, back, strict=False):
        assert other is not None
        expected = replace(row, temperature=float(np.float32(row.temperature)))
        assert replace(other, repetition_penalty=row.repetition_penalty) == expected
        if row.allowed is not None:
            assert np.array_equal(row.allowed, other.allowed)
        if row.edited:
            assert np.array_equal(row.output_ids, other.output_ids)
    params.fill([])
    assert params.rows() == [None] * (len(rows) + 2)


def test_bad_input_is_named(device: torch.device) -> None:
    params = SampleParams(max_rows=2, vocab_size=100, device=device, extra_words=40)
    workspace = SampleWorkspace(max_rows=2, vocab_size=100, device=device)
    out = SampleOut.allocate(2, device)
    good = torch.zeros(2, 100, device=device)

    def refused(message: str, logits: torch.Tensor = good, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            sample(logits, params, out, workspace, **options)

    refused("logits has dtype float64", good.double())
    refused("logits has shape", good[0])
    refused("logits has stride 2 in its last dimension", good.repeat(1, 2)[:, ::2])
    refused("logits starts 4 bytes past", torch.zeros(201, device=device)[1:].view(2, 100))
    refused("logits has a stride of 404 bytes", torch.zeros(2, 101, device=device)[:, :100])
    refused("params has room for 2 rows, logits has 3", torch.zeros(3, 100, device=device))
    refused("params is made for a vocabulary of 100, logits has 96", good[:, :96])
    refused("vocab_start is 33", vocab_start=33)
    refused("late_ids has dtype int32", late_ids=torch.zeros(2, dtype=torch.int32, device=device))
    refused("late_ids has shape", late_ids=torch.zeros(2, 1, dtype=torch.int64, device=device))
    refused("late_ids has stride 2", late_ids=torch.zeros(4, dtype=torch.int64, device=device)[::2])
    refused("tensors on several devices", late_ids=torch.zeros(2, dtype=torch.int64, device="meta"))
    params.fill([DrawRow(temperature=1.0)], [2])
    refused("late_ids has 2 entries, a row takes entry 2")
    refused("late_ids has 1 entries, a row takes entry 2", late_ids=torch.zeros(1, dtype=torch.int64, device=device))
    params.fill([DrawRow(temperature=1.0, top_k=3)])
    refused("reduce_max: top-k", vocab_start=32)
    for rows, message in (
        ([DrawRow()] * 3, "rows has 3 entries, at most 2"),
        ([DrawRow(logprobs=21)], "logprobs is 21 in row 0, at most 20"),
        ([DrawRow(forbid_ids=tuple(range(41)))], "forbid of row 0 ends at word 105 of a sampling buffer of 104"),
        ([DrawRow(allowed=np.zeros(3, dtype=np.int32))], "allowed has 3 words in row 0, expected 4"),
    ):
        with pytest.raises(ValueError, match=message):
            params.fill(rows)
    sample(good[:0], params, out, workspace)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("token_ids", torch.zeros(3, dtype=torch.int32)),
        ("token_ids", torch.zeros(6, dtype=torch.int64)[::2]),
        ("token_ids", torch.zeros(4, dtype=torch.int64)[1:]),
        ("scores", torch.zeros(4)),
        ("logprobs", torch.zeros(3, dtype=torch.float64)),
        ("top_ids", torch.zeros(3, 19, dtype=torch.int32)),
        ("top_logprobs", torch.zeros(3, 21)[:, :20]),
    ],
)
def test_bad_outputs_are_named(name: str, tensor: torch.Tensor) -> None:
    out = SampleOut.allocate(3, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name} "):
        replace(out, **{name: tensor})
    with pytest.raises(ValueError, match=f"^tensors on several devices: .*{name} on meta"):
        replace(out, **{name: getattr(out, name).to("meta")})


def test_settings_exist_for_any_number_of_rows() -> None:
    for target in AOT_TARGETS.values():
        for rows in (1, 2, 64, 100, 1024):
            assert default(target, rows)["splits"] >= 4
            assert candidates(target, key(rows))
