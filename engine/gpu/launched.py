"""A step in the device's queue, and what came of it."""

import threading
import time

import torch

from biphase.engine.gpu.accelerator import Event
from biphase.engine.step import StepResult
from biphase.protos.errors import EngineLost, one_line


class Launched:
    """``tokens``: in pinned memory, of the sequences ``drawing``, once ``end`` has passed. ``told``: set when all layers
    have been told of (Engine.on_layers); None where nobody follows."""

    def __init__(
        self,
        tokens: torch.Tensor,
        drawing: tuple[int, ...],
        num_seqs: int,
        start: Event,
        end: Event,
        told: threading.Event | None = None,
    ) -> None:
        self._tokens = tokens
        self._drawing = drawing
        self._num_seqs = num_seqs
        self._start = start
        self._launched_s = time.perf_counter()
        self.end = end
        self._told = told
        self._lock = threading.Lock()
        self._result: StepResult | None = None

    def wait(self) -> StepResult:
        """Raises what the device reports; tokens are read once, before their buffer is used again. Any thread."""
        with self._lock:
            if self._result is None:
                self._result = self._read()
            return self._result

    def _read(self) -> StepResult:
        try:
            self.end.wait()
        except RuntimeError as error:
            raise EngineLost(f"the GPU failed: {one_line(error)}") from error
        if self._told is not None:
            self._told.wait()  # of a step that is over all has been told
        tokens: list[int | None] = [None] * self._num_seqs
        for i, token in zip(self._drawing, self._tokens.tolist(), strict=True):
            tokens[i] = token
        step_ms = self.end.ms_since(self._start) or (time.perf_counter() - self._launched_s) * 1e3
        return StepResult(tokens=tuple(tokens), step_ms=step_ms)
