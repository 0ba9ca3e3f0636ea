"""How the process of a rank ends when its instance is lost: at once, whatever hangs in it."""

import logging
import os
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress

from biphase.engine.engine_thread import EngineThread
from biphase.protos.errors import SetupError, one_line
from biphase.protos.process import Announcer

CLOSE_WITHIN_S = 5.0
CLOSE_AFTER_ERROR_S = 1.0
"""Of an engine thread that may wait for ranks which are gone."""
TELL_WITHIN_S = 0.5
"""The log may be a pipe that nobody reads, or a disk that hangs."""
_log = logging.getLogger(__name__)


def end_process(announcer: Announcer, error: BaseException) -> None:
    """Tell why and end, from any thread: 2 for a set-up that cannot work, else 1. Other ranks see it by their sockets,
    routers by their links; nothing that a kill -9 would not leave behind is left."""
    line, code = one_line(error), 2 if isinstance(error, SetupError) else 1
    with suppress(Exception):
        threading.Thread(target=_end_unheard, args=(code,), name="end", daemon=True).start()
    with suppress(Exception):
        _log.error("%s, rank %d, ends: %s", announcer.current.name, announcer.current.rank, line)
        announcer.update(state="failed" if isinstance(error, SetupError) else "lost", detail=line)
    if isinstance(error, SetupError):
        with suppress(Exception):
            print(f"biphase: {line}", file=sys.stderr, flush=True)
    with suppress(Exception):
        logging.shutdown()
    os._exit(code)


def _end_unheard(code: int) -> None:
    time.sleep(TELL_WITHIN_S)
    os._exit(code)


class EndWhenLost:
    """To be called with a channel's ``lost``."""

    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer

    def __call__(self, lost: "Future[str]") -> None:
        end_process(self._announcer, RuntimeError(lost.result()))


async def close_engine(thread: EngineThread, announcer: Announcer, error: BaseException | None = None) -> None:
    """Close a rank's engine thread. Ends the process where that hangs: a step has lost its other ends by then."""
    within_s = CLOSE_WITHIN_S if error is None else CLOSE_AFTER_ERROR_S
    if not await thread.close(within_s):
        end_process(announcer, error or RuntimeError(f"the engine thread has not ended within {within_s:g} s"))
