"""One end of the connection between the same place of two neighbouring stages: activations, in the order of the steps."""

from collections import deque
from typing import Any

import torch

from biphase.engine.parallel.exchange import exchanging

_MAX_UNSENT = 8
"""Steps whose activations the next stage has not taken: more than any pipeline holds, so that a sender rarely waits."""


class Pipe:
    """Owns the process group of two. A send returns at once; its tensor is kept until the other end has it."""

    def __init__(self, group: Any, peer: int) -> None:
        self._group = group
        self._peer = peer
        self._unsent: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """A copy of ``tensor`` to the next stage. Raises EngineLost."""
        with exchanging("sending activations"):
            while len(self._unsent) >= _MAX_UNSENT:
                self._unsent.popleft()[0].wait()
            copy = tensor.clone(memory_format=torch.contiguous_format)
            self._unsent.append((self._group.send([copy], self._peer, 0), copy))

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out``, contiguous, with what the previous stage sent. Raises EngineLost."""
        with exchanging("receiving activations"):
            self._group.recv([out], self._peer, 0).wait()
        return out

    def close(self) -> None:
        self._unsent.clear()
        self._group.abort()
