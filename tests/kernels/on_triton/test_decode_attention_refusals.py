"""What ``decode_attention`` and its workspace refuse, by name. Tables are looked at in debug mode only."""

from typing import Any

import pytest
import torch
from support.decode_attention_case import Case, workspace_of

from biphase.kernels.decode_attention.triton_gpu import DecodeWorkspace, decode_attention, plan_decode
from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.target import AOT_TARGETS, compiling_for

FP8 = torch.float8_e4m3fn

BAD = {
    "q": {"q_NHD": torch.zeros(2, 4, 64, dtype=torch.float16)},
    "q has shape": {"q_NHD": torch.zeros(2, 3, 64)},
    "q has shape .2, 256": {"q_NHD": torch.zeros(2, 256)},
    "q has shape .., expected": {"q_NHD": torch.tensor(0.0)},
    "q has a stride of 1028 bytes": {"q_NHD": torch.zeros(2, 257)[:, :256].view(2, 4, 64)},
    "q has stride 2": {"q_NHD": torch.zeros(2, 4, 128)[..., ::2]},
    "q starts": {"q_NHD": torch.zeros(2 * 4 * 64 + 1)[1:].view(2, 4, 64)},
    "q has heads": {"q_NHD": torch.zeros(2, 4, 128)[..., :64]},
    "pool_layer has shape": {"pool_layer": torch.zeros(3, 2, 2, 32, 64)},
    "pool_layer has dtype": {"pool_layer": torch.zeros(3, 2, 2, 16, 64, dtype=torch.float16)},
    "pool_layer with": {"pool_layer": torch.zeros(3, 2, 2, 64, 16).transpose(3, 4)},
    "pool_layer has shape .3, 2, 2, 16": {"pool_layer": torch.zeros(3, 2, 2, 16)},
    "pool_layer starts": {"pool_layer": torch.zeros(3 * 4096 + 1)[1:].view(3, 2, 2, 16, 64)},
    "block_tables has shape .2": {"block_tables": torch.zeros(2, dtype=torch.int32)},
    "block_tables has shape": {"block_tables": torch.zeros(3, 2, dtype=torch.int32)},
    "block_tables has dtype": {"block_tables": torch.zeros(2, 2, dtype=torch.int64)},
    "block_tables has stride": {"block_tables": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]},
    "context_lens has dtype": {"context_lens": torch.ones(2, dtype=torch.int64)},
    "context_lens has shape": {"context_lens": torch.tensor(1, dtype=torch.int32)},
    "context_lens with shape": {"context_lens": torch.ones(4, dtype=torch.int32)[::2]},
    "context_lens has 3": {"context_lens": torch.ones(3, dtype=torch.int32)},
    "query_starts": {"query_starts": torch.zeros(2, dtype=torch.int32)},
    "query_starts has dtype": {"query_starts": torch.arange(3)},
    "query_starts with shape": {"query_starts": torch.zeros(6, dtype=torch.int32)[::2]},
    "tensors on several devices": {"block_tables": torch.zeros(2, 2, dtype=torch.int32, device="meta")},
    "out has shape": {"out_NHD": torch.zeros(3, 4, 64)},
    "out has a stride": {"out_NHD": torch.zeros(2, 257)[:, :256].view(2, 4, 64)},
    "out has stride": {"out_NHD": torch.zeros(2, 4, 128)[..., ::2]},
    "out has heads": {"out_NHD": torch.zeros(2, 4, 128)[..., :64]},
    "out starts": {"out_NHD": torch.zeros(513)[1:].view(2, 4, 64)},
    "out has dtype": {"out_NHD": torch.zeros(2, 4, 64, dtype=torch.float16)},
    "window": {"window": 5},
    "soft_cap": {"soft_cap": 0.0},
    "kv_scale": {"kv_scale": torch.ones(2, 2)},
    "max_query_len": {"max_query_len": 2},
}


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=BAD)
def test_bad_arguments_are_named(message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "q_NHD": torch.zeros(2, 4, 64),
        "pool_layer": torch.zeros(3, 2, 2, 16, 64),
        "block_tables": torch.zeros(2, 2, dtype=torch.int32),
        "context_lens": torch.ones(2, dtype=torch.int32),
        "query_starts": torch.arange(3, dtype=torch.int32),
        "workspace": workspace_of(Case(contexts=(1, 1)), torch.device("cpu")),
        "out_NHD": torch.zeros(2, 4, 64),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        decode_attention(**arguments | change)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("head_dim is 80", {"head_dim": 80}),
        ("block_size is 8", {"block_size": 8}),
        ("num_heads is 5", {"num_heads": 5}),
        ("num_heads is 0", {"num_heads": 0}),
        ("num_heads is 4", {"num_kv_heads": 0}),
        ("max_seqs is 0", {"max_seqs": 0}),
        ("max_query_len is 0", {"max_query_len": 0}),
        ("window is 0", {"window": 0}),
        ("kv_dtype has dtype int8", {"kv_dtype": torch.int8}),
    ],
)
def test_impossible_workspaces_are_refused(message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"max_seqs": 4, "max_query_len": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    arguments |= {"block_size": 16, "kv_dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=f"^{message}"):
        DecodeWorkspace.allocate(**arguments | change)


def test_fp8_is_refused_below_capability_8_9() -> None:
    with compiling_for(AOT_TARGETS[80]), pytest.raises(ValueError, match=r"fp8 .* A100 has 8\.0"):
        workspace_of(Case(contexts=(1,), kv_dtype=FP8), torch.device("meta"))


@pytest.mark.parametrize(
    ("contexts", "entry", "message"),
    [
        ((20, 3), 3, r"block_tables\[0, 1\] is 3, the pool has blocks 0 to 2"),
        ((40, 3), 0, "block_tables has 2 entries"),
    ],
)
def test_debug_mode_checks_block_tables(
    monkeypatch: pytest.MonkeyPatch, contexts: tuple[int, int], entry: int, message: str
) -> None:
    monkeypatch.setattr(table_check, "DEBUG", True)
    workspace = workspace_of(Case(contexts=contexts), torch.device("cpu"))
    q, pool = torch.zeros(2, 4, 64), torch.zeros(3, 2, 2, 16, 64)
    tables = torch.tensor([[0, entry], [1, -1]], dtype=torch.int32)
    context_lens, starts = torch.tensor(contexts, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{message}"):
        decode_attention(q, pool, tables, context_lens, starts, workspace, q, scale=1.0)


@pytest.mark.parametrize(
    ("starts", "max_query_len", "message"),
    [
        ((0, 1, 3), 2, "query_starts gives sequence 1 the rows 1 to 3 of 2, its context is 3"),
        ((0, 2, 1), 2, "query_starts gives sequence 1 the rows 2 to 1"),
        ((-1, 1, 2), 2, "query_starts gives sequence 0 the rows -1 to 1"),
        ((0, 2, 2), 1, "query_starts gives sequence 0 the rows 0 to 2 of 2, its context is 20, max_query_len is 1"),
        ((0, 1, 2), 1, None),
    ],
)
def test_debug_mode_checks_query_starts(
    monkeypatch: pytest.MonkeyPatch, starts: tuple[int, int, int], max_query_len: int, message: str | None
) -> None:
    monkeypatch.setattr(table_check, "DEBUG", True)
    workspace = workspace_of(Case(contexts=(20, 3), max_query_len=2), torch.device("cpu"))
    q, pool = torch.zeros(2, 4, 64), torch.zeros(3, 2, 2, 16, 64)
    tables = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)
    lens = torch.tensor([20, 3], dtype=torch.int32)
    query_starts = torch.tensor(starts, dtype=torch.int32)

    def attend() -> None:
        plan_decode(lens, query_starts, workspace)
        decode_attention(
            q, pool, tables, lens, query_starts, workspace, q.clone(), scale=1.0, max_query_len=max_query_len
        )

    if message is None:
        attend()
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            attend()
