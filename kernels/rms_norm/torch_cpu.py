"""RMS norm with the caller's output buffer. Features may have leading head dimensions: ``[..., F, N]``."""

from functools import lru_cache

import torch


def rms_norm(x_FN: torch.Tensor, weight_F1: torch.Tensor, eps: float, out_FN: torch.Tensor) -> torch.Tensor:
    """Normalises over dimension -2 (the features of one token, or of one head of it); returns ``out``.

    ``out`` may be ``x`` itself.
    """
    squares = torch.mul(x_FN, x_FN).sum(dim=-2, keepdim=True)
    # mean + eps in one call; torch's mean takes five times as long as the sum, and a number as operand becomes a tensor
    scale = torch.add(_constant(eps), squares, alpha=1 / x_FN.shape[-2]).rsqrt_()
    return torch.mul(x_FN, scale, out=out_FN).mul_(weight_F1)


@lru_cache(maxsize=8)
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)
