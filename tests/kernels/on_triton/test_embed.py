"""``embed`` against its reference: tokens from the host, tokens drawn by the step before, rows that are no multiple."""

import pytest
import torch

from biphase.kernels.embed.reference import embed_reference
from biphase.kernels.embed.triton_gpu import embed
from biphase.kernels.gpu import table_check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features"), [(1, 8), (5, 576), (3, 1032), (0, 64)])
def test_embed_equals_its_reference(device: torch.device, dtype: torch.dtype, rows: int, features: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    table = torch.randn(50, features, generator=generator).to(dtype).to(device)
    token_ids = torch.randint(0, 50, (rows,), generator=generator).to(device)
    drawn = torch.randint(0, 50, (7,), generator=generator).to(device)
    sources = torch.randint(-1, 7, (rows,), generator=generator, dtype=torch.int32).to(device)
    out, expected = (torch.full((rows, features), torch.nan, dtype=dtype, device=device) for _ in range(2))
    embed(token_ids, sources, drawn, table, out)
    embed_reference(token_ids, sources, drawn, table, expected)
    assert torch.equal(out, expected)


def test_drawn_tokens_are_taken_only_where_a_source_says_so(device: torch.device) -> None:
    table = torch.arange(12.0, device=device).unsqueeze(1).repeat(1, 8)
    out = torch.empty(3, 8, device=device)
    embed(
        torch.tensor([1, 2, 3], device=device),
        torch.tensor([-1, 1, 0], dtype=torch.int32, device=device),
        torch.tensor([10, 11], device=device),
        table,
        out,
    )
    assert out[:, 0].tolist() == [1.0, 11.0, 10.0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("token_ids", {"token_ids": torch.zeros(2, dtype=torch.int32)}),
        ("sources", {"sources": torch.zeros(3, dtype=torch.int32)}),
        ("token_ids", {"token_ids": torch.zeros(4, dtype=torch.int64)[::2]}),
        ("token_ids", {"token_ids": torch.zeros(3, dtype=torch.int64)[1:]}),
        ("token_ids", {"token_ids": torch.zeros(2, 1, dtype=torch.int64)}),
        ("sources", {"sources": torch.zeros(2, dtype=torch.int64)}),
        ("sources", {"sources": torch.zeros(4, dtype=torch.int32)[::2]}),
        ("sources", {"sources": torch.zeros(3, dtype=torch.int32)[1:]}),
        ("drawn", {"drawn": torch.zeros(2, dtype=torch.int32)}),
        ("drawn", {"drawn": torch.zeros(2, 1, dtype=torch.int64)}),
        ("drawn", {"drawn": torch.zeros(4, dtype=torch.int64)[::2]}),
        ("drawn", {"drawn": torch.zeros(3, dtype=torch.int64)[1:]}),
        ("table", {"table_VF": torch.zeros(4, 9)}),
        ("table", {"table_VF": torch.zeros(8)}),
        ("table", {"table_VF": torch.zeros(4, 8, dtype=torch.int8), "out_NF": torch.zeros(2, 8, dtype=torch.int8)}),
        ("table", {"table_VF": torch.zeros(4, 8).double(), "out_NF": torch.zeros(2, 8).double()}),
        ("table", {"table_VF": torch.zeros(4, 16)[:, ::2]}),
        ("table", {"table_VF": torch.zeros(4, 9)[:, :8]}),
        ("table", {"table_VF": torch.zeros(33)[1:].view(4, 8)}),
        ("tensors on several devices", {"table_VF": torch.zeros(4, 8, device="meta")}),
        ("tensors on several devices", {"drawn": torch.zeros(2, dtype=torch.int64, device="meta")}),
        ("out", {"out_NF": torch.zeros(2, 8, dtype=torch.float16)}),
        ("out", {"out_NF": torch.zeros(2)}),
        ("out", {"out_NF": torch.zeros(2, 9)[:, :8]}),
        ("out", {"out_NF": torch.zeros(17)[1:].view(2, 8)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        embed(**_good() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": torch.tensor([4, 3])}, r"token_ids\[0\] is 4, table has rows 0 to 3"),
        ({"token_ids": torch.tensor([-1, 0])}, r"token_ids\[0\] is -1"),
        ({"sources": torch.tensor([-1, 2], dtype=torch.int32)}, r"sources\[1\] is 2, drawn has rows 0 to 1"),
        ({"drawn": torch.tensor([0, 4, 0])}, r"drawn\[1\] is 4, table has rows 0 to 3"),
        ({"token_ids": torch.tensor([3, 99])}, None),
        ({"drawn": torch.tensor([99, 0, 99])}, None),
    ],
)
def test_debug_mode_checks_what_is_read(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, torch.Tensor], message: str | None
) -> None:
    """The first row has its token given, the second takes what was drawn in row 1."""
    monkeypatch.setattr(table_check, "DEBUG", True)
    arguments = _good() | {"sources": torch.tensor([-1, 1], dtype=torch.int32)} | change
    if message is None:
        embed(**arguments)
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            embed(**arguments)


def _good() -> dict[str, torch.Tensor]:
    return {
        "token_ids": torch.zeros(2, dtype=torch.int64),
        "sources": torch.zeros(2, dtype=torch.int32),
        "drawn": torch.zeros(2, dtype=torch.int64),
        "table_VF": torch.zeros(4, 8),
        "out_NF": torch.zeros(2, 8),
    }
