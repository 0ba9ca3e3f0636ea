"""What Triton would compile for the launches of a GPU's step, without a GPU and without running any.

Triton's own binder gives the key of each: dtypes and alignment of tensors, what is None, which integers are 1, multiples
of 16 or wide, constexprs, options. Two launches of one key share their machine code. See ``recording``.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from biphase.kernels.gpu import launch, target
from biphase.kernels.gpu.target import Target
from biphase.kernels.linear import rows

Signature = tuple[str, str]
"""Kernel, and the key that Triton compiles it under."""

Binder = Callable[..., tuple[dict[str, Any], list[Any], dict[str, Any]]]


class Signatures:
    """``made``: those recorded so far. ``new``: those that were not among them when ``sealed`` was last called."""

    def __init__(self, capability: int) -> None:
        self.made: set[Signature] = set()
        self.new: list[Signature] = []
        self._sealed = False
        self._backend = CUDABackend(GPUTarget("cuda", capability, 32))
        self._binder = functools.cache(self._binder_of)

    def seal(self) -> None:
        """From here on, what was not made before is ``new``."""
        self._sealed = True

    def record(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        if 0 in grid:
            return
        _, specialization, options = self._binder(kernel)(*args, **settings)
        signature = (kernel.fn.__name__, f"{specialization} {sorted(options.items())}")
        if signature not in self.made:
            self.made.add(signature)
            if self._sealed:
                self.new.append(signature)

    def _binder_of(self, kernel: Any) -> Binder:
        """An interpreted kernel keeps what it was made with; a binder takes a compiled one."""
        compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        binder: Binder = create_function_from_signature(compiled.signature, compiled.params, self._backend)
        return binder


@contextmanager
def recording(gpu: Target) -> Iterator[Signatures]:
    """Within it, kernels on the CPU are chosen as for ``gpu``, its tuning table included, and recorded instead of run.
    Dense products are cuBLAS's: an engine made within it leaves them out."""
    signatures = Signatures(gpu.capability)
    with (
        patch.object(target, "INTERPRETER", gpu),
        patch.object(rows, "linear_rows", lambda *tensors: None),
        launch.launching_instead(signatures.record),
    ):
        yield signatures
