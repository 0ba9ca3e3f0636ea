"""Lives whose places were given away because their hosts could not be reached: told to end, and killed, until seen gone.

They are part of the controller's state, so that its next life goes on with that.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from biphase.cluster.backend import Handle
from biphase.cluster.controller_state import AbandonedLife
from biphase.cluster.worker_link import Told, retire

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

EVERY_S = 2.0
GIVES_UP_S = 3600.0
"""A life that Ray does not list and that nobody has reached for so long is gone with its host."""
MAX_LIVES = 64
WHY = "another life has taken its place"
Tell = Callable[[str, int, int, str, float], Awaitable[Told]]
logger = logging.getLogger("biphase.cluster.controller")


class Retiring:
    """Owned by the controller. ``lives``: those not seen gone yet, oldest first."""

    def __init__(self, controller: "Controller", *, tell: Tell = retire, every_s: float = EVERY_S) -> None:
        self._controller, self._tell, self._every_s = controller, tell, every_s
        self.lives: dict[tuple[str, int], AbandonedLife] = {}

    def begin(self, life: AbandonedLife, handle: Handle | None) -> None:
        """``handle``: where the backend still lists it; without one its address is all there is."""
        while len(self.lives) >= MAX_LIVES:
            self.lives.pop(next(iter(self.lives)))
        self.lives[life.name, life.life] = life
        self._controller.spawn(self._follow(life, handle))

    def restore(self, lives: Iterable[AbandonedLife], found: Mapping[tuple[str, int], Handle]) -> None:
        """What earlier lives of the controller have not seen gone."""
        for life in lives:
            self.begin(life, found.get((life.name, life.life)))

    async def _follow(self, life: AbandonedLife, handle: Handle | None) -> None:
        key, gone = (life.name, life.life), ""
        while not gone and key in self.lives:
            gone = await self._try(life, handle)
        if self.lives.pop(key, None) is not None:
            logger.info("%s#%d is gone at last: %s", life.name, life.incarnation, gone)
            core = self._controller.core
            if life.node and life.node not in core.unreachable.silent:  # of a silent host its own word alone tells
                core.reached(life.node)
            self._controller.changed()

    async def _try(self, life: AbandonedLife, handle: Handle | None) -> str:
        """One more word to it; returns why it is known to be gone, empty while it is not."""
        controller = self._controller
        told: Told = "silent"
        if life.address:
            told = await self._tell(life.address, life.incarnation, controller.epoch, WHY, self._every_s)
        if handle is not None:
            await controller.backend.kill(handle)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(handle.ended(), self._every_s)
            return handle.end or ""
        if not life.address:
            return "nothing lists it any more"
        if told != "silent":
            return "it was told to end" if told == "told" else "it is not at its address any more"
        if controller.now_s() - life.since_s >= GIVES_UP_S:
            return f"not reached for {GIVES_UP_S:g} s"
        await asyncio.sleep(self._every_s)
        return ""
