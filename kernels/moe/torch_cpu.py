"""Experts on the CPU: a loop over those that have tokens, feature-major.

Shapes: E experts, k of them per token, F hidden features, I intermediate features of an expert, N tokens, n tokens
of one expert. Routing as in Mixtral ("Mixtral of Experts", Jiang et al. 2024, section 2.1) and Qwen3-MoE.
"""

import torch

from biphase.kernels.linear import linear, padded_tokens
from biphase.kernels.silu_mul import silu_mul


def route(logits_EN: torch.Tensor, num_taken: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts of the highest logits, the lower id first among equals: ids and weights ``[k, N]``.

    The weights are the softmax over all experts; ``renormalize``: over those taken.
    """
    taken = logits_EN.sort(dim=0, descending=True, stable=True)
    ids_KN, logits_KN = taken.indices[:num_taken], taken.values[:num_taken]
    if renormalize:
        return ids_KN, logits_KN.softmax(dim=0)
    return ids_KN, logits_EN.softmax(dim=0).gather(0, ids_KN)


def add_experts(
    x_FN: torch.Tensor,
    ids_KN: torch.Tensor,
    weights_KN: torch.Tensor,
    gate_up_EXF: torch.Tensor,
    down_EFI: torch.Tensor,
    residual_FN: torch.Tensor,
) -> None:
    """``residual += sum over a token's experts of weight * (down @ (silu(gate @ x) * (up @ x)))``; X = 2 I.

    Ids below 0 are experts that are not here: they add nothing.
    """
    for expert in ids_KN.unique().tolist():
        if expert < 0:
            continue
        slots_n, tokens_n = (ids_KN == expert).nonzero(as_tuple=True)
        count = tokens_n.shape[0]
        padding = padded_tokens(count) - count
        x_Fn = x_FN.index_select(1, torch.nn.functional.pad(tokens_n, (0, padding)))
        gate_up_Xn = linear(gate_up_EXF[expert], x_Fn, x_Fn.new_empty(gate_up_EXF.shape[1], count + padding))
        gate_In, up_In = gate_up_Xn.chunk(2)
        out_Fn = linear(down_EFI[expert], silu_mul(gate_In, up_In), torch.empty_like(x_Fn))[:, :count]
        residual_FN.index_add_(1, tokens_n, out_Fn * weights_KN[slots_n, tokens_n])
