"""One life of an instance: one role under one incarnation, from its first link to its stop, its break or its turn.

It ends in order whatever ends it: nothing new is taken, what runs ends by itself, by a grace or by us, the steps end, the
links take their last messages. Then its phase may be closed.
"""

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from biphase.engine.link import Identity
from biphase.engine.link_service import LinkService
from biphase.engine.orders import Orders, Turn
from biphase.engine.standard_services import StandardServices
from biphase.engine.worker import Worker, lost_line
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.errors import EngineLost, Internal
from biphase.protos.process import Announcer
from biphase.protos.values import Role

_log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""How long a stopping worker waits for its links to take their last messages."""
TURN_FLUSH_S = 0.2
"""The same of one that turns: whoever waits for its new role waits for this too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What a process is asked. ``stop``: end, after a drain where its config has a grace for that; ``now``: without."""

    stop: asyncio.Event
    now: asyncio.Event = field(default_factory=asyncio.Event)


class Life:
    """Answers for ``worker`` on ``service``, which is the process's."""

    def __init__(
        self,
        config: WorkerConfig,
        worker: Worker[Any, Any],
        identity: Identity,
        *,
        service: LinkService,
        standard: StandardServices,
        announcer: Announcer,
        roles: Collection[Role],
    ) -> None:
        self.orders = Orders(worker, identity, roles)
        self.drained_s = 0.0
        """When it had nothing left to do (time.monotonic), so that what follows could begin."""
        self._config = config
        self._worker = worker
        self._identity = identity
        self._service = service
        self._standard = standard
        self._announcer = announcer

    async def run(self, ends: Ends, **ready: object) -> Turn | None:
        """Serve, announced as ``ready`` says, until the end: returns what follows, None where nothing does. Raises
        EngineLost, or Internal for a step loop that broke."""
        self._tell_of_drains()
        stepping = asyncio.create_task(self._worker.run())
        self._service.begin(self._identity, self._worker, self.orders)
        await self._standard.set_serving(True)
        us = self._identity
        self._announcer.update(
            state="ready", detail="", progress=1.0, kind=us.role, incarnation=us.incarnation, **ready
        )
        turn = await self._until_over(stepping, ends)
        await self._end(stepping, turn)
        return turn

    def _tell_of_drains(self) -> None:
        announcer = self._announcer
        self._worker.on_drain = lambda: announcer.update(state="draining", detail="takes no new work")
        self._worker.on_drained = lambda: announcer.update(state="draining", detail="drained")
        self._worker.on_resume = lambda: announcer.update(state="ready", detail="")

    async def _until_over(self, stepping: "asyncio.Task[None]", ends: Ends) -> Turn | None:
        """Wait until nothing keeps this life from ending; what follows it."""
        worker, orders = self._worker, self.orders
        at_once = (stepping, ends.now, orders.retiring)
        await _first(*at_once, ends.stop, orders.turning)
        turn = orders.turn
        if turn is not None and not _any(*at_once, ends.stop):
            self._announcer.update(state="draining", detail=f"turns into a {turn.role} instance")
            await _first(*at_once, ends.stop, worker.no_legs)
            if not _any(*at_once, ends.stop):
                self.drained_s = time.monotonic()
                return turn
        if ends.stop.is_set() and self._config.drain_s > 0 and not _any(*at_once):
            orders.stopping = True
            worker.drain(self._config.drain_s)
            await _first(*at_once, worker.no_legs)
        return None

    async def _end(self, stepping: "asyncio.Task[None]", turn: Turn | None) -> None:
        us, orders = self._identity, self.orders
        broken = stepping.exception() if stepping.done() else None
        reason = "the instance stops"
        if isinstance(broken, EngineLost):
            reason = lost_line(broken)
        elif broken is not None:
            reason = "the instance broke"
        elif orders.retired:
            reason = f"{us.name} retires: {orders.retired}"
        elif turn is not None:
            reason = f"{us.name} turns into a {turn.role} instance"
        self._announcer.update(state="draining", detail="stopping" if turn is None else reason)
        await self._standard.set_serving(False)
        self._worker.stop(reason, "cancelled" if broken is not None or orders.retired else "drained")
        await asyncio.wait({stepping})
        await self._worker.legs_ended(FLUSH_S)
        if isinstance(broken, EngineLost):
            raise broken
        if broken is not None:
            _log.error("the step loop broke", exc_info=broken)
            raise Internal(f"{us.name}: the step loop broke: {broken!r}")
        await self._service.end(reason, FLUSH_S if turn is None else TURN_FLUSH_S)


_Wait = asyncio.Event | asyncio.Future[Any]


async def _first(*waits: _Wait) -> None:
    """Wait until one of them has come."""
    made = [asyncio.ensure_future(wait.wait()) for wait in waits if isinstance(wait, asyncio.Event)]
    try:
        futures = [wait for wait in waits if not isinstance(wait, asyncio.Event)]
        await asyncio.wait([*made, *futures], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in made:
            task.cancel()


def _any(*waits: _Wait) -> bool:
    return any(wait.is_set() if isinstance(wait, asyncio.Event) else wait.done() for wait in waits)
