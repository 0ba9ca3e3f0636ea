"""Benches are programs, not a package: their folder is put on the path, as it is when one is run."""

import sys
from pathlib import Path

import pytest
from support.bare_python import bare_environment

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that has little more than torch, with nobody's settings of kernels."""
    environment = bare_environment(tmp_path_factory.mktemp("bare"))
    return {
        name: value for name, value in environment.items() if not name.startswith(("TRITON_", "BIPHASE_", "PYTEST_"))
    }
