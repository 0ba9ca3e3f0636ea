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
        """Contiguous ``tensor`` to the next stage; nobody may write to it any more. Raises EngineLost."""
        with exchanging("sending activations"):
            while len(self._unsent) >= _MAX_UNSENT:
                self._unsent.popleft()[0].wait()
            self._unsent.append((self._group.send([tensor], self._peer, 0), tensor))

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out``, contiguous, with what the previous stage sent. Raises EngineLost."""
        with exchanging("receiving activations"):
            self._group.recv([out], self._peer, 0).wait()
        return out

    def close(self) -> None:
        """Waits for nothing. gloo closes its connections with its last reference."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
        self._unsent.clear()
