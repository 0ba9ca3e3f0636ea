"""Input tokens and their embeddings in one launch.

A row's token is ``token_ids[row]``, or what the last step drew in its row ``sources[row]`` where that is not negative: so
a step can be launched before the host has seen the tokens it continues.
"""

import torch

from biphase.kernels.embed.triton_kernel import embed_kernel
from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.check import check_dtype, check_rows, check_same_device, check_shape
from biphase.kernels.gpu.launch import launch

_BLOCK = 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def embed(
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    table_VF: torch.Tensor,
    out_NF: torch.Tensor,
) -> None:
    """``out[n] = table[token of row n]``.

    ``token_ids`` [N] int64 (its values are trusted: the host has checked them); ``sources`` [N] int32, rows of ``drawn``
    or negative; ``drawn`` [R] int64; ``table`` [V, F] and ``out`` [N, F] of one dtype, rows aligned to 16 bytes.
    In debug mode (kernels.gpu.table_check) ids and sources are checked too. Raises ValueError naming the argument.
    """
    check_shape("out", out_NF, None, None)
    num_rows, num_features = out_NF.shape
    check_dtype("token_ids", token_ids, torch.int64)
    check_dtype("sources", sources, torch.int32)
    check_dtype("drawn", drawn, torch.int64)
    check_dtype("table", table_VF, *_DTYPES)
    check_dtype("out", out_NF, table_VF.dtype)
    check_shape("token_ids", token_ids, num_rows)
    check_shape("sources", sources, num_rows)
    check_shape("drawn", drawn, None)
    check_shape("table", table_VF, None, num_features)
    given = {"token_ids": token_ids, "sources": sources, "drawn": drawn, "table": table_VF, "out": out_NF}
    for name, tensor in given.items():
        check_rows(name, tensor)
    check_same_device(**given)
    if table_check.may_check(out_NF):
        _check_ids(token_ids, sources, drawn, table_VF.shape[0])
    launch(
        embed_kernel,
        (num_rows, -(-num_features // _BLOCK)),
        token_ids,
        sources,
        drawn,
        table_VF,
        out_NF,
        num_features,
        table_stride=table_VF.stride(0),
        out_stride=out_NF.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _check_ids(token_ids: torch.Tensor, sources: torch.Tensor, drawn: torch.Tensor, vocab_size: int) -> None:
    from_drawn = sources >= 0
    table_check.check_range("sources", sources, drawn.shape[0], "drawn has rows", where=from_drawn)
    table_check.check_range("token_ids", token_ids, vocab_size, "table has rows", where=~from_drawn)
    used = torch.zeros(drawn.shape, dtype=torch.bool, device=drawn.device)
    used[sources[from_drawn].long()] = True
    table_check.check_range("drawn", drawn, vocab_size, "table has rows", where=used)
