"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU, made to compute as a GPU does."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton"):
    from support.triton_interpreter import patch_interpreter

    patch_interpreter()
else:  # not a Linux machine
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
