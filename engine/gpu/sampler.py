"""Draws of a step on the device: parameters in, tokens out, nothing read by the host in between."""

from collections.abc import Sequence

import torch

from biphase.engine.gpu.accelerator import Accelerator
from biphase.kernels.ops import PagedKernels
from biphase.kernels.sample import DrawRow


class GpuSampler:
    """``tokens`` [rows] int64: what the last step drew, at an address that graphs read and write."""

    def __init__(
        self, accelerator: Accelerator, kernels: PagedKernels, *, max_rows: int, vocab_size: int, num_buffers: int
    ) -> None:
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=accelerator.device)
        self._rows: list[DrawRow] = []

    def prepare(self, rows: Sequence[DrawRow], *, padded: int) -> None:
        """What the next ``run`` does; rows up to ``padded`` draw nothing."""
        self._rows = [*rows, *([DrawRow()] * (padded - len(rows)))]

    def run(self, logits_RV: torch.Tensor) -> None:
        """Draw one token per row of logits."""
        from biphase.kernels.sample import sample
        self.tokens[:len(logits_RV)] = torch.tensor(sample(logits_RV.float().contiguous(), self._rows))
