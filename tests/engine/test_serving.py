"""Why an instance of several ranks is said not to have loaded."""

import asyncio

import pytest

from biphase.engine.engine import Engine, Progress
from biphase.engine.serving import _load
from biphase.protos.errors import EngineLost, Internal, SetupError
from biphase.protos.process import Announcement, Announcer


class FailingThread:
    """Rank 0's engine thread, whose loading fails so."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def load(self, progress: Progress) -> Engine:
        raise self._error


@pytest.mark.parametrize("told_before", [True, False])
@pytest.mark.parametrize(
    ("own", "told"),
    [
        (EngineLost("a sum: another rank is lost"), "rank 1: out of memory"),
        (SetupError("the model has no layers"), "the model has no layers"),
    ],
)
async def test_the_reason_is_told_not_who_missed_the_rank(own: Exception, told: str, told_before: bool) -> None:
    announcer = Announcer(Announcement(name="d", kind="decode", incarnation=1, pid=1), lambda announcement: None)
    failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    delay_s = 0.0 if told_before else 0.05
    asyncio.get_running_loop().call_later(delay_s, failed.set_result, Internal("rank 1: out of memory"))
    with pytest.raises((Internal, SetupError), match=told):
        await _load(FailingThread(own), announcer, asyncio.Event(), failed)  # type: ignore[arg-type]
