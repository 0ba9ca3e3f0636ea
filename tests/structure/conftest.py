"""The sources, read once."""

import pytest
from support.sources import Sources


@pytest.fixture(scope="session")
def sources() -> Sources:
    return Sources()
