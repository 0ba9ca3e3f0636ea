"""The places of one stage: sums of their parts of an activation, and the parts of a row of logits put together."""

from collections.abc import Sequence
from typing import Any

import torch

from biphase.engine.parallel.exchange import exchanging

_DIRECT_UP_TO_BYTES = 256 << 10
"""Over gloo a sum of less than this goes straight to every other place: its all-reduce passes each message through a
queue and another thread. 18 KiB on two cores, medians: 0.31 ms instead of 0.51 between two processes, 0.29 where it was
expected; among four 40 % less time. From about 0.5 MiB on gloo's ring is faster."""


class TensorGroup:
    """Owns the process group of a stage. All places make the same calls in the same order, and get the same bits."""

    def __init__(self, group: Any, *, direct: bool) -> None:
        """``direct``: small sums by pairs of messages instead of the group's own all-reduce."""
        self._group = group
        self.place: int = group.rank()
        self.size: int = group.size()
        self._direct_bytes = _DIRECT_UP_TO_BYTES if direct else 0
        self._others = [place for place in range(self.size) if place != self.place]
        self._received: dict[int, torch.Tensor] = {}
        self._arriving: tuple[int, list[Any]] | None = None

    def expect(self, tensor: torch.Tensor) -> None:
        """Say that the next exchange is a sum of tensors of this size. Said before the products that lead to it, it lets
        what faster places have computed arrive meanwhile, instead of being asked for then."""
        if tensor.nbytes <= self._direct_bytes:
            with exchanging("a sum over the tensor-parallel ranks"):
                self._arriving = (tensor.numel(), self._receive(tensor))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace contiguous ``tensor`` by the sum over all places. Raises EngineLost."""
        with exchanging("a sum over the tensor-parallel ranks"):
            if tensor.nbytes <= self._direct_bytes:
                self._sum_directly(tensor)
            else:
                self._group.allreduce([tensor]).wait()
        return tensor

    def gather_columns(self, part_RV: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
        """All places' columns side by side, on place 0; None on the others. ``sizes``: columns of each place."""
        with exchanging("gathering over the tensor-parallel ranks"):
            if self.place:
                self._group.send([part_RV.contiguous()], 0, 0).wait()
                return None
            parts = [part_RV, *(part_RV.new_empty(part_RV.shape[0], sizes[place]) for place in self._others)]
            for work in [self._group.recv([parts[place]], place, 0) for place in self._others]:
                work.wait()
        return torch.cat(parts, dim=1)

    def all_gather(self, out_PX: torch.Tensor, part_X: torch.Tensor) -> None:
        """``out[p]`` becomes place p's ``part``, on every place; contiguous, every part of the same shape."""
        with exchanging("gathering over the tensor-parallel ranks"):
            self._group._allgather_base(out_PX.flatten(0, 1), part_X).wait()

    def close(self) -> None:
        """Waits for nothing. gloo closes its connections with its last reference."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _receive(self, like: torch.Tensor) -> list[Any]:
        received = self._received.get(like.numel())
        if received is None or received.dtype != like.dtype:
            received = self._received[like.numel()] = like.new_empty(self.size, like.numel())
        return [self._group.recv([received[place]], place, 0) for place in self._others]

    def _sum_directly(self, tensor: torch.Tensor) -> None:
        expected, self._arriving = self._arriving, None
        if expected is None:
            arriving = self._receive(tensor)
        else:
            count, arriving = expected
            assert count == tensor.numel(), f"a sum of {tensor.numel()} elements, {count} were expected"
        leaving = [self._group.send([tensor], place, 0) for place in self._others]
        for work in (*arriving, *leaving):
            work.wait()
        received, flat = self._received[tensor.numel()], tensor.view(-1)
        if self.size == 2:
            flat.add_(received[self._others[0]])
            return
        # in the order of the places, whoever adds: the sum has the same bits everywhere
        received[self.place].copy_(flat)
        torch.add(received[0], received[1], out=flat)
        for place in range(2, self.size):
            flat.add_(received[place])
