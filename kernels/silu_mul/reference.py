"""What ``silu_mul`` computes on token-major rows, at sight."""

import torch


def silu_mul_rows_reference(gate_up_NX: torch.Tensor, out_NI: torch.Tensor) -> None:
    """``out = silu(gate) * up`` in float32, with the Triton launcher's arguments."""
    gate, up = gate_up_NX.float().chunk(2, dim=-1)
    out_NI.copy_(gate * torch.sigmoid(gate) * up)
