"""A step's numbers on their way to the device: written into pinned memory, sent in one copy, read at fixed addresses.

Graphs read these addresses, so they never move. The host writes to one of several buffers in turn, so that a step can be
prepared while the copy of the last one is still to be done; order on the device is the stream's.
"""

from dataclasses import dataclass

import numpy as np
import torch

from biphase.engine.gpu.accelerator import Accelerator, Event

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInputs:
    """numpy views of one pinned buffer; shapes as in StepInputs."""

    token_ids: np.ndarray
    slots: np.ndarray
    sources: np.ndarray
    positions: np.ndarray
    query_starts: np.ndarray
    context_lens: np.ndarray
    sampled_rows: np.ndarray
    block_tables: np.ndarray
    bytes_of: torch.Tensor


class StepInputs:
    """Capacity for ``max_rows`` tokens and ``max_seqs`` decode sequences of ``table_width`` blocks.

    On the device: ``token_ids`` [rows] int64; ``slots`` [rows] int64, -1 for padding; ``sources`` [rows] int32, the row of
    the last step's output that the token comes from or -1; ``positions`` [rows] int32; ``query_starts`` [seqs + 1],
    ``context_lens`` [seqs] int32, 0 for padding; ``sampled_rows`` [seqs] int64; ``block_tables`` [seqs, width] int32.
    """

    def __init__(
        self, accelerator: Accelerator, *, max_rows: int, max_seqs: int, table_width: int, num_buffers: int
    ) -> None:
        # rows of block_tables are read with vector loads: their stride is a multiple of 16 bytes
        width = -(-table_width // 4) * 4
        fields = [
            _Field("token_ids", torch.int64, (max_rows,)),
            _Field("slots", torch.int64, (max_rows,)),
            _Field("sources", torch.int32, (max_rows,)),
            _Field("positions", torch.int32, (max_rows,)),
            _Field("query_starts", torch.int32, (max_seqs + 1,)),
            _Field("context_lens", torch.int32, (max_seqs,)),
            _Field("sampled_rows", torch.int64, (max_seqs,)),
            _Field("block_tables", torch.int32, (max_seqs, width)),
        ]
        total = sum(field.num_bytes for field in fields)
        self._accelerator = accelerator
        self._on_device = torch.zeros(total, dtype=torch.uint8, device=accelerator.device)
        views = _views(self._on_device, fields)
        self.token_ids = views["token_ids"]
        self.slots = views["slots"]
        self.sources = views["sources"]
        self.positions = views["positions"]
        self.query_starts = views["query_starts"]
        self.context_lens = views["context_lens"]
        self.sampled_rows = views["sampled_rows"]
        self.block_tables = views["block_tables"]
        self._tables_at = total - fields[-1].num_bytes
        self._table_row_bytes = width * 4
        self._host: list[tuple[HostInputs, Event]] = []
        for _ in range(num_buffers):
            buffer = accelerator.host_buffer(total)
            arrays = {name: view.numpy() for name, view in _views(buffer, fields).items()}
            self._host.append((HostInputs(bytes_of=buffer, **arrays), Event()))
        self._next = 0

    def host(self) -> HostInputs:
        """The buffer to fill for the next upload; waits until its last copy is over."""
        inputs, copied = self._host[self._next]
        copied.wait()
        return inputs

    def upload(self, num_seqs: int) -> None:
        """Send the buffer that ``host`` gave, block tables of the first ``num_seqs`` sequences only."""
        inputs, _ = self._host[self._next]
        count = self._tables_at + num_seqs * self._table_row_bytes
        self._on_device[:count].copy_(inputs.bytes_of[:count], non_blocking=True)
        self._host[self._next] = (inputs, self._accelerator.record())
        self._next = (self._next + 1) % len(self._host)


def _views(flat: torch.Tensor, fields: list[_Field]) -> dict[str, torch.Tensor]:
    found, at = {}, 0
    for field in fields:
        count = 1
        for extent in field.shape:
            count *= extent
        found[field.name] = flat[at : at + count * field.dtype.itemsize].view(field.dtype).view(field.shape)
        at += field.num_bytes
    return found
