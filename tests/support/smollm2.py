"""The packaged SmolLM2 model for tests: the marks of a test that reads it."""

import pytest

from biphase.protos.errors import SetupError
from biphase.protos.model_source import resolve


def _missing() -> str:
    try:
        resolve("smollm2")
    except SetupError as error:
        return str(error)
    return ""


def needs_smollm2(test):  # type: ignore[no-untyped-def]
    """Decorator: marked `model`; skipped, saying how to install it, on a machine without the model's package."""
    reason = _missing()
    return pytest.mark.model(pytest.mark.skipif(bool(reason), reason=reason or "installed")(test))
