"""The gate of the feed-forward layer: ``silu(gate) * up``."""

import torch
import torch.nn.functional as F


def silu_mul(gate_IN: torch.Tensor, up_IN: torch.Tensor) -> torch.Tensor:
    """In place in ``gate``, which is returned. Both ``[intermediate, tokens]``."""
    return F.silu(gate_IN, inplace=True).mul_(up_IN)


__all__ = ["silu_mul"]
