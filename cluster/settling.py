"""When a new life of the controller may tell the routers who the members are.

Its epoch is the higher one, so its first word is obeyed whole: said before those that run are heard, it would take working
instances out of the routers. Until then the last membership stands there. A life that begins on a host that is cut off hears
of nobody: it says nothing until that is over.
"""

import asyncio
from typing import Any

from biphase.cluster.broadcast import Broadcast
from biphase.cluster.reconcile import Reconciler

SETTLE_S = 3.0
"""Routers wait no longer for an instance that does not answer."""


async def until_settled(core: Reconciler, changes: Broadcast[Any], within_s: float = SETTLE_S) -> None:
    """Wait until all that was found running is linked or lost, looking at every change; so long at most in which this host
    reaches others, after a cut anew."""
    while not core.is_settled:
        if core.reach.is_cut_off:
            await changes.wait()
            continue
        try:
            async with asyncio.timeout(within_s):
                while not (core.is_settled or core.reach.is_cut_off):
                    await changes.wait()
        except TimeoutError:
            if not core.reach.is_cut_off:
                return
