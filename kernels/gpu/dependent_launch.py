"""Programmatic dependent launch: a kernel may start before the one ahead of it has ended, and waits inside.

Off unless BIPHASE_PDL=1 (the measurement that would settle a default needs a GPU of capability 9.0 or newer). A kernel
that offers it takes ``PDL: tl.constexpr`` and, where that is set, reads nothing but constants (weights, tables) before
``gdc_wait``; every program of it waits, so that the end of a kernel means the end of all kernels before it.
"""

import os

from biphase.kernels.gpu.launch import INTERPRETED
from biphase.kernels.gpu.target import Target

_WANTED = os.environ.get("BIPHASE_PDL") == "1"
_MIN_CAPABILITY = 90


def dependent_launch(target: Target) -> dict[str, bool]:
    """The launch arguments ``PDL`` (the kernel's constexpr) and ``launch_pdl`` (Triton's option)."""
    on = _WANTED and not INTERPRETED and target.capability >= _MIN_CAPABILITY
    return {"PDL": on, "launch_pdl": on}
