"""What ``prefill_attention`` computes: token by token and head by head, and as the GPU launcher takes it."""

from collections.abc import Sequence

import torch

from biphase.kernels.prefill_attention.tile_plan import PrefillPlan


def prefill_attention_reference(
    q_NHD: torch.Tensor, pool_layer: torch.Tensor, table: Sequence[int], start: int, window: int | None = None
) -> torch.Tensor:
    """``[N, H, D]``: token n, at position start + n, attends to itself and all (or window - 1) tokens before it."""
    num_tokens, num_heads, dim = q_NHD.shape
    kv_heads, block_size = pool_layer.shape[2], pool_layer.shape[3]
    out = torch.empty_like(q_NHD)
    for n in range(num_tokens):
        end = start + n + 1
        first = 0 if window is None else max(0, end - window)
        places = [(table[t // block_size], t % block_size) for t in range(first, end)]
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            k_TD = torch.stack([pool_layer[block, 0, kv_head, offset] for block, offset in places])
            v_TD = torch.stack([pool_layer[block, 1, kv_head, offset] for block, offset in places])
            out[n, head] = torch.softmax(k_TD @ q_NHD[n, head] / dim**0.5, dim=0) @ v_TD
    return out


def prefill_attention_paged_reference(
    q_NHD: torch.Tensor,
    pool_layer: torch.Tensor,
    plan: PrefillPlan,
    out_NHD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: torch.Tensor | None = None,
) -> None:
    """Same arguments as the launcher in triton_gpu.py; float32 inside. Reads no slot past a sequence's context."""
    _, _, kv_heads, block_size, dim = pool_layer.shape
    device = q_NHD.device
    scale_XK = torch.ones(2, kv_heads, device=device) if kv_scale is None else kv_scale
    start = plan.first_row
    for sequence, (count, context) in enumerate(zip(plan.query_lens, plan.context_lens, strict=True)):
        rows = slice(start, start + count)
        start += count
        if count == 0:
            continue
        key_T = torch.arange(context, device=device)
        block_T = plan.block_tables[sequence].long()[key_T // block_size]
        kv_TXKD = pool_layer[block_T, :, :, key_T % block_size].float() * scale_XK.unsqueeze(-1)
        k_KTD, v_KTD = kv_TXKD.permute(1, 2, 0, 3)
        q_KnGD = q_NHD[rows].float().view(count, kv_heads, -1, dim).transpose(0, 1)
        scores_KnGT = torch.einsum("kngd,ktd->kngt", q_KnGD, k_KTD) * scale
        if soft_cap is not None:
            scores_KnGT = soft_cap * torch.tanh(scores_KnGT / soft_cap)
        position_n = torch.arange(context - count, context, device=device)
        distance_nT = position_n.unsqueeze(1) - key_T
        hidden_nT = distance_nT < 0 if window is None else (distance_nT < 0) | (distance_nT >= window)
        weights_KnGT = scores_KnGT.masked_fill(hidden_nT.unsqueeze(1), -torch.inf).softmax(-1)
        out_NHD[rows] = torch.einsum("kngt,ktd->nkgd", weights_KnGT, v_KTD).reshape(count, -1, dim).to(out_NHD.dtype)
