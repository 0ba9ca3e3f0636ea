"""Set-up of all tests: Triton kernels run in its interpreter where there is no GPU; what is long runs when asked for."""

import os
from pathlib import Path

import pytest

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # read when a kernel is defined, so before any test module imports one; processes that compile for a GPU clear it
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is unset


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
