"""What ``rms_norm`` computes, at sight."""

import torch


def rms_norm_reference(x_FN: torch.Tensor, weight_F1: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, mean over the first dimension."""
    return x_FN / torch.sqrt((x_FN * x_FN).mean(dim=0, keepdim=True) + eps) * weight_F1
