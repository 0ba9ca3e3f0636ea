"""Draws of a step on the device: parameters in, tokens out, nothing read by the host in between."""

from collections.abc import Sequence

import torch

from biphase.kernels.ops import PagedKernels
from biphase.kernels.sample import DrawRow
from biphase.kernels.sample.buffers import SampleOut, SampleWorkspace
from biphase.kernels.sample.params import SampleParams


class GpuSampler:
    """Owns the device memory of draws, at addresses that graphs read and write."""

    def __init__(self, kernels: PagedKernels, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._kernels = kernels
        self._params = SampleParams(max_rows=max_rows, vocab_size=vocab_size, device=device)
        self._out = SampleOut.allocate(max_rows, device)
        self._workspace = SampleWorkspace(max_rows=max_rows, vocab_size=vocab_size, device=device)

    @property
    def tokens(self) -> torch.Tensor:
        """[rows] int64: what the last step drew, by row of its logits."""
        return self._out.token_ids

    def prepare(self, rows: Sequence[DrawRow]) -> None:
        """What the next ``run`` does, row by row; rows behind them draw nothing."""
        self._params.fill(rows)

    def run(self, logits_RV: torch.Tensor) -> None:
        """Draw a token for each row of logits that was prepared."""
        self._kernels.sample(logits_RV, self._params, self._out, self._workspace)
