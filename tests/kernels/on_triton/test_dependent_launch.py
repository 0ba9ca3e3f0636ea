"""Programmatic dependent launch is asked for only where it was wanted and the GPU has it."""

import pytest

from biphase.kernels.gpu import dependent_launch as module
from biphase.kernels.gpu.target import AOT_TARGETS


@pytest.mark.parametrize(
    ("wanted", "interpreted", "capability", "on"),
    [
        (True, False, 90, True),
        (True, False, 100, True),
        (True, False, 89, False),
        (True, True, 90, False),
        (False, False, 90, False),
    ],
)
def test_where_it_is_on(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, interpreted: bool, capability: int, on: bool
) -> None:
    monkeypatch.setattr(module, "_WANTED", wanted)
    monkeypatch.setattr(module, "INTERPRETED", interpreted)
    assert module.dependent_launch(AOT_TARGETS[capability]) == {"PDL": on, "launch_pdl": on}
