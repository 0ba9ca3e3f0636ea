"""What ``decode_attention`` computes: sequence by sequence and head by head, and as the GPU launcher takes it."""

from collections.abc import Sequence

import torch

from biphase.kernels.decode_attention.workspace import DecodeWorkspace


def decode_attention_reference(
    q_BHD: torch.Tensor,
    pool_layer: torch.Tensor,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    window: int | None = None,
) -> torch.Tensor:
    """``[B, H, D]``: softmax(q k / sqrt(D)) v over the last ``window`` of each sequence's ``lengths`` tokens.

    ``pool_layer`` [blocks, 2, kv heads, block_size, D]; ``tables`` the block ids of each sequence.
    """
    num_heads, dim = q_BHD.shape[1], q_BHD.shape[2]
    kv_heads, block_size = pool_layer.shape[2], pool_layer.shape[3]
    out = torch.empty_like(q_BHD)
    for b, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        first = 0 if window is None else max(0, length - window)
        places = [(table[t // block_size], t % block_size) for t in range(first, length)]
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            k_TD = torch.stack([pool_layer[block, 0, kv_head, offset] for block, offset in places])
            v_TD = torch.stack([pool_layer[block, 1, kv_head, offset] for block, offset in places])
            out[b, head] = torch.softmax(k_TD @ q_BHD[b, head] / dim**0.5, dim=0) @ v_TD
    return out


def decode_attention_paged_reference(
    q_NHD: torch.Tensor,
    pool_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    workspace: DecodeWorkspace | None,
    out_NHD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: torch.Tensor | None = None,
    max_query_len: int = 1,
) -> None:
    """Same arguments as the launcher in triton_gpu.py; float32 inside; needs no workspace and no plan.

    Reads the lengths on the host. Reads no slot past a sequence's context; rows of padding sequences stay as they are.
    """
    _, _, num_kv_heads, block_size, dim = pool_layer.shape
    device = q_NHD.device
    scale_XK = torch.ones(2, num_kv_heads, device=device) if kv_scale is None else kv_scale
    starts = query_starts.tolist()
    for sequence, context in enumerate(context_lens.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        count = rows.stop - rows.start
        if context == 0 or count == 0:
            continue
        key_T = torch.arange(context, device=device)
        block_T = block_tables[sequence].long()[key_T // block_size]
        kv_TXKD = pool_layer[block_T, :, :, key_T % block_size].float() * scale_XK.unsqueeze(-1)
        k_KTD, v_KTD = kv_TXKD.permute(1, 2, 0, 3)
        q_KjGD = q_NHD[rows].float().view(count, num_kv_heads, -1, dim).transpose(0, 1)
        logits_KjGT = torch.einsum("kjgd,ktd->kjgt", q_KjGD, k_KTD) * scale
        if soft_cap is not None:
            logits_KjGT = soft_cap * torch.tanh(logits_KjGT / soft_cap)
        distance_jT = torch.arange(context - count, context, device=device).unsqueeze(1) - key_T
        hidden_jT = distance_jT < 0 if window is None else (distance_jT < 0) | (distance_jT >= window)
        weights_KjGT = logits_KjGT.masked_fill(hidden_jT.unsqueeze(1), -torch.inf).softmax(-1)
        out_NHD[rows] = torch.einsum("kjgt,ktd->jkgd", weights_KjGT, v_KTD).reshape(count, -1, dim).to(out_NHD.dtype)
