"""Cosine and sine of every position and frequency, once per model."""

from collections.abc import Sequence

import torch


def rotation_table(
    inverse_frequencies: Sequence[float], max_positions: int, device: torch.device | str
) -> torch.Tensor:
    """``[P, 2, R / 2]`` float32: cos, then sin, of ``float32(position) * float32(frequency)``, as Hugging Face takes it.

    Scaled rotations (Llama 3) come as scaled frequencies.
    """
    frequencies = torch.tensor(list(inverse_frequencies), dtype=torch.float32)
    angles = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1) * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)
