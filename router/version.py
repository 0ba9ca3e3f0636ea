"""Which release of biphase this is."""

import importlib.metadata


def version() -> str:
    try:
        return importlib.metadata.version("biphase")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
