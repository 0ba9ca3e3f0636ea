"""``embed`` against its reference: tokens from the host, tokens drawn by the step before, rows that are no multiple."""

import pytest
import torch

from biphase.kernels.embed.reference import embed_reference
from biphase.kernels.embed.triton_gpu import embed


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
        ("table", {"table_VF": torch.zeros(4, 9)}),
        ("out", {"out_NF": torch.zeros(2, 8, dtype=torch.float16)}),
        ("table", {"table_VF": torch.zeros(4, 16)[:, ::2]}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, torch.Tensor]) -> None:
    arguments = {
        "token_ids": torch.zeros(2, dtype=torch.int64),
        "sources": torch.zeros(2, dtype=torch.int32),
        "drawn": torch.zeros(2, dtype=torch.int64),
        "table_VF": torch.zeros(4, 8),
        "out_NF": torch.zeros(2, 8),
    }
    with pytest.raises(ValueError, match=f"^{name} "):
        embed(**{**arguments, **change})
