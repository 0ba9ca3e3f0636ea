"""``--smoke``: a GPU bench at tiny sizes where there is no GPU, its kernels interpreted, to test the bench itself."""

import os
import sys
from pathlib import Path

import torch

_SETTINGS = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "BIPHASE_KERNELS": "triton"}


def enter_smoke() -> None:
    """Call it first in main: starts the program again where Triton was imported without its interpreter."""
    if torch.cuda.is_available():
        return
    if any(os.environ.get(name) != value for name, value in _SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _SETTINGS)
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.triton_interpreter import patch_interpreter

    patch_interpreter()
