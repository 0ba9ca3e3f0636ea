"""Writes what the controller must not forget. A failing write (a full disk, a cluster without its head) stops nothing: it is
said once, what is to be written stays in memory, and is tried again."""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from biphase.protos.errors import one_line

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

RETRY_S = 2.0
logger = logging.getLogger("biphase.cluster.controller")


class Keeping:
    """Owned by the controller. ``troubles``: by what is not kept, the line about it that status shows."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self.troubles: dict[str, str] = {}

    async def attempt(self, what: str, write: Callable[[], Awaitable[None]]) -> bool:
        """Whether it is written. OSError is the only failure that is borne."""
        try:
            await write()
        except OSError as error:
            self._failed(what, f"{what} cannot be written, tried again: {error.strerror or one_line(error)}")
            return False
        self._done(what)
        return True

    def _failed(self, what: str, trouble: str) -> None:
        before, warnings = self.troubles.get(what), self._controller.warnings
        self.troubles[what] = trouble
        if before is None:
            warnings.append(trouble)
            logger.error("%s", trouble)
            self._tell(trouble)
        elif before != trouble:  # the same trouble in other words
            warnings[:] = [trouble if line == before else line for line in warnings]
            self._controller.status.changed()

    def _done(self, what: str) -> None:
        trouble = self.troubles.pop(what, "")
        if trouble:
            self._controller.warnings[:] = [line for line in self._controller.warnings if line != trouble]
            self._tell(f"{what} is written again")

    def _tell(self, text: str) -> None:
        self._controller.events.add("warning", "controller", text)
        self._controller.status.changed()
