"""What ``linear`` computes, at sight."""

import torch


def linear_reference(w_OI: torch.Tensor, x_IN: torch.Tensor) -> torch.Tensor:
    """``[out, in] @ [in, tokens] -> [out, tokens]`` in float64, returned as float32."""
    return (w_OI.double() @ x_IN.double()).float()
