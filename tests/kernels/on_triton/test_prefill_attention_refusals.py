"""What ``prefill_attention`` and its plan refuse, by name. Tables are looked at in debug mode only."""

from typing import Any

import pytest
import torch

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.target import AOT_TARGETS, compiling_for
from biphase.kernels.prefill_attention.tile_plan import plan_prefill
from biphase.kernels.prefill_attention.triton_gpu import prefill_attention

BF16, F8 = torch.bfloat16, torch.float8_e4m3fn


def meta_inputs(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "q_NHD": torch.empty(8, 4, 64, dtype=BF16, device="meta"),
        "pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=BF16, device="meta"),
        "out_NHD": torch.empty(8, 4, 64, dtype=BF16, device="meta"),
        **change,
    }


def launch_on_meta(tensors: dict[str, torch.Tensor], **options: object) -> None:
    pool = meta_inputs()["pool_layer"]
    plan = plan_prefill([8], [8], torch.empty(1, 4, dtype=torch.int32, device="meta"), pool, num_heads=4)
    arguments: dict[str, object] = {"scale": 1.0, **options}
    prefill_attention(tensors["q_NHD"], tensors["pool_layer"], plan, tensors["out_NHD"], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("q has dtype", {"q_NHD": torch.empty(8, 4, 64, dtype=torch.float64, device="meta")}),
        ("q has shape", {"q_NHD": torch.empty(8, 3, 64, dtype=BF16, device="meta")}),
        ("q has stride 2", {"q_NHD": torch.empty(8, 4, 128, dtype=BF16, device="meta")[..., ::2]}),
        ("q has a stride of 520", {"q_NHD": torch.empty(8, 260, dtype=BF16, device="meta")[:, :256].view(8, 4, 64)}),
        ("head_dim is 80", {"q_NHD": torch.empty(8, 4, 80, dtype=BF16, device="meta")}),
        ("out has dtype", {"out_NHD": torch.empty(8, 4, 64, device="meta")}),
        ("q has shape", {"q_NHD": torch.empty(8, 256, dtype=BF16, device="meta")}),
        ("q starts 2 bytes", {"q_NHD": torch.empty(2049, dtype=BF16)[1:].view(8, 4, 64)}),
        ("out has a stride", {"out_NHD": torch.empty(8, 260, dtype=BF16, device="meta")[:, :256].view(8, 4, 64)}),
        ("out has stride 2", {"out_NHD": torch.empty(8, 4, 128, dtype=BF16, device="meta")[..., ::2]}),
        ("out starts 2 bytes", {"out_NHD": torch.empty(2049, dtype=BF16)[1:].view(8, 4, 64)}),
        ("pool_layer starts 2 bytes", {"pool_layer": torch.empty(81921, dtype=BF16)[1:].view(5, 2, 2, 64, 64)}),
        ("pool_layer with shape", {"pool_layer": torch.empty(5, 2, 2, 64, 128, dtype=BF16, device="meta")[..., ::2]}),
        ("q has 4 heads", {"pool_layer": torch.empty(5, 2, 0, 64, 64, dtype=BF16, device="meta")}),
        ("tensors on several devices", {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=BF16)}),
        ("out has shape", {"out_NHD": torch.empty(7, 4, 64, dtype=BF16, device="meta")}),
        ("pool_layer has dtype", {"pool_layer": torch.empty(5, 2, 2, 64, 64, device="meta")}),
        ("pool_layer has shape", {"pool_layer": torch.empty(5, 2, 64, 64, dtype=BF16, device="meta")}),
        ("block_size is 48", {"pool_layer": torch.empty(5, 2, 2, 48, 64, dtype=BF16, device="meta")}),
        ("q has 4 heads", {"pool_layer": torch.empty(5, 2, 3, 64, 64, dtype=BF16, device="meta")}),
        ("kv_scale is missing", {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=F8, device="meta")}),
        ("q has 4 rows", {n: torch.empty(4, 4, 64, dtype=BF16, device="meta") for n in ("q_NHD", "out_NHD")}),
    ],
)
def test_bad_tensors_are_named(named: str, change: dict[str, torch.Tensor]) -> None:
    with compiling_for(AOT_TARGETS[90]), pytest.raises(ValueError, match=f"^{named}"):
        launch_on_meta(meta_inputs(**change))


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("scale is 0", {"scale": 0.0}),
        ("window is 0", {"window": 0}),
        ("soft_cap is -1", {"soft_cap": -1.0}),
        ("scale is nan", {"scale": float("nan")}),
        ("kv_scale was given", {"kv_scale": torch.empty(2, 2, device="meta")}),
    ],
)
def test_bad_options_are_named(named: str, options: dict[str, object]) -> None:
    with compiling_for(AOT_TARGETS[90]), pytest.raises(ValueError, match=f"^{named}"):
        launch_on_meta(meta_inputs(), **options)


@pytest.mark.parametrize(
    ("named", "query_lens", "context_lens"),
    [
        ("query_lens has 2 entries", [1, 1], [1]),
        (r"query_lens\[0\] is 5", [5], [4]),
        (r"context_lens\[0\] is 257", [1], [257]),
    ],
)
def test_bad_lengths_are_named(named: str, query_lens: list[int], context_lens: list[int]) -> None:
    tables = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{named}"):
        plan_prefill(query_lens, context_lens, tables, torch.empty(5, 2, 2, 64, 64), num_heads=4)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("block_tables is int64", {"block_tables": torch.zeros(1, 4, dtype=torch.int64)}),
        (r"block_tables is int32 \[4\]", {"block_tables": torch.zeros(4, dtype=torch.int32)}),
        ("block_tables is int32 .* with strides", {"block_tables": torch.zeros(1, 8, dtype=torch.int32)[:, ::2]}),
        ("block_tables starts 4 bytes", {"block_tables": torch.zeros(1, 5, dtype=torch.int32)[:, 1:]}),
        ("pool_layer has shape", {"pool_layer": torch.empty(5, 2, 2, 64)}),
        ("pool_layer has shape", {"pool_layer": torch.empty(5, 3, 2, 64, 64)}),
        ("head_dim is 80", {"pool_layer": torch.empty(5, 2, 2, 64, 80)}),
        ("block_size is 48", {"pool_layer": torch.empty(5, 2, 2, 48, 64)}),
        ("num_heads is 4, no multiple of the 0", {"pool_layer": torch.empty(5, 2, 0, 64, 64)}),
        ("num_heads is 5", {"num_heads": 5}),
        ("num_heads is 0", {"num_heads": 0}),
        ("first_row is -1", {"first_row": -1}),
    ],
)
def test_bad_arguments_of_the_plan_are_named(named: str, change: dict[str, Any]) -> None:
    arguments = {
        "query_lens": [3],
        "context_lens": [4],
        "block_tables": torch.zeros(1, 4, dtype=torch.int32),
        "pool_layer": torch.empty(5, 2, 2, 64, 64),
        "num_heads": 4,
    }
    with pytest.raises(ValueError, match=f"^{named}"):
        plan_prefill(**arguments | change)


@pytest.mark.parametrize(
    ("named", "kv_scale"),
    [
        ("kv_scale has dtype", torch.empty(2, 2, dtype=BF16, device="meta")),
        ("kv_scale has shape", torch.empty(2, 3, device="meta")),
        ("kv_scale with", torch.empty(2, 4, device="meta")[:, ::2]),
        ("tensors on several devices", torch.empty(2, 2)),
    ],
)
def test_bad_scales_are_named(named: str, kv_scale: torch.Tensor) -> None:
    change = {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=F8, device="meta")}
    with compiling_for(AOT_TARGETS[90]), pytest.raises(ValueError, match=f"^{named}"):
        launch_on_meta(meta_inputs(**change), kv_scale=kv_scale)


@pytest.mark.parametrize(
    ("window", "query", "entries", "message"),
    [
        (None, 5, (0, 3, 9), r"block_tables\[0, 1\] is 3, the pool has blocks 0 to 2"),
        (None, 5, (-1, 0, 9), r"block_tables\[0, 0\] is -1"),
        (33, 5, (-1, 0, 9), r"block_tables\[0, 0\] is -1"),
        (32, 5, (0, -1, 9), r"block_tables\[0, 1\] is -1"),
        (32, 5, (-1, 0, 9), None),
        (None, 0, (9, 9, 9), None),
    ],
)
def test_debug_mode_checks_block_tables(
    window: int | None, query: int, entries: tuple[int, ...], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks that some query token sees. A sequence of 100 tokens is in two blocks of 64."""
    monkeypatch.setattr(table_check, "DEBUG", True)
    pool, q = torch.zeros(3, 2, 2, 64, 64), torch.zeros(5, 4, 64)
    tables = torch.tensor([entries], dtype=torch.int32)
    plan = plan_prefill([query], [100], tables, pool, num_heads=4)
    if message is None:
        prefill_attention(q, pool, plan, torch.empty_like(q), scale=1.0, window=window)
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            prefill_attention(q, pool, plan, torch.empty_like(q), scale=1.0, window=window)


def test_fp8_is_refused_where_there_is_none() -> None:
    change = {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=F8, device="meta")}
    with compiling_for(AOT_TARGETS[80]), pytest.raises(ValueError, match="fp8 KV cache needs a GPU of capability 8.9"):
        launch_on_meta(meta_inputs(**change), kv_scale=torch.empty(2, 2, device="meta"))
