"""What becomes of an exchange that fails: the engine is lost, since other ranks are in the middle of the same step."""

from collections.abc import Iterator
from contextlib import contextmanager

from biphase.protos.errors import EngineLost, one_line


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Raises EngineLost for what torch.distributed reports: a peer that is gone, a deadline that has passed."""
    try:
        yield
    except RuntimeError as error:
        raise EngineLost(f"{what}: another rank is lost ({one_line(error)})") from error
