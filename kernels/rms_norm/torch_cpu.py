"""RMS norm with the caller's output buffer. Features may have leading head dimensions: ``[..., F, N]``."""

import torch


def rms_norm(x_FN: torch.Tensor, weight_F1: torch.Tensor, eps: float, out_FN: torch.Tensor) -> torch.Tensor:
    """Normalises over dimension -2 (the features of one token, or of one head of it); returns ``out``.

    ``out`` may be ``x`` itself.
    """
    scale = torch.mul(x_FN, x_FN).mean(dim=-2, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(x_FN, scale, out=out_FN).mul_(weight_F1)
