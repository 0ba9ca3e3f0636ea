"""What ``rms_norm`` computes, at sight."""

import torch


def rms_norm_reference(x_FN: torch.Tensor, weight_F1: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, mean over the first dimension."""
    return x_FN / torch.sqrt((x_FN * x_FN).mean(dim=0, keepdim=True) + eps) * weight_F1


def rms_norm_rows_reference(x_NF: torch.Tensor, weight_F: torch.Tensor, eps: float, out_NF: torch.Tensor) -> None:
    """Token-major, with the Triton launcher's arguments; ``out`` may be ``x``."""
    x = x_NF.float()
    out_NF.copy_(x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight_F.float())


def add_rms_norm_rows_reference(
    x_NF: torch.Tensor, residual_NF: torch.Tensor, weight_F: torch.Tensor, eps: float, out_NF: torch.Tensor
) -> None:
    """``residual += x`` in the residual's dtype, then its norm."""
    residual_NF.copy_(residual_NF.float() + x_NF.float())
    rms_norm_rows_reference(residual_NF, weight_F, eps, out_NF)
