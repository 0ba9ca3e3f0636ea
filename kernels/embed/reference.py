"""What ``embed`` computes, in two torch calls."""

import torch


def embed_reference(
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    table_VF: torch.Tensor,
    out_NF: torch.Tensor,
) -> None:
    """Same arguments as the launcher."""
    tokens = torch.where(sources >= 0, drawn[sources.clamp(min=0).long()], token_ids)
    out_NF.copy_(table_VF[tokens])
