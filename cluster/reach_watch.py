"""Asks other hosts whether they can be reached: before an instance is given up for its silence, while none answers, and
where one could not be reached. What follows from it the pure ``reach`` and ``reconcile`` decide.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

ASK_S = 0.75
"""Within a link's second opinion, so that this makes no loss later."""
FRESH_S = 2.0
LOOK_EVERY_S = 1.0


class ReachWatch:
    """Owned by the controller. ``ask``: whether the host of an address answers."""

    def __init__(self, controller: "Controller", ask: Callable[[str], Awaitable[bool]] | None = None) -> None:
        self._controller = controller
        self._ask = ask or answers
        self._looking: asyncio.Task[None] | None = None
        self._began_s = float("-inf")
        self._answered: dict[str, bool] = {}

    async def run(self) -> None:
        """Ask all others once, whom an earlier life may have known; then while this host is cut off, and those that could
        not be reached, again and again."""
        await self.look()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._controller.core.awake(self._controller.now_s())
            if self._controller.core.reach.is_cut_off:
                await self.look()
            await self.look_for_silent()

    def suspect(self) -> None:
        """A link has broken: ask all others now."""
        if self._looking is None or self._looking.done():
            self._began_s = self._controller.now_s()
            self._looking = asyncio.create_task(self._look())

    async def look(self) -> None:
        """Ask all others, or wait for those that are being asked."""
        self.suspect()
        assert self._looking is not None
        await asyncio.shield(self._looking)

    async def may_be_lost(self, address: str) -> bool:
        """Whether the instance there, which is silent, may be given up; if not, it is to be asked again."""
        if is_here(host_of(address)):
            return True
        under_way = self._looking is not None and not self._looking.done()
        if under_way or self._controller.now_s() - self._began_s > FRESH_S:
            await self.look()
        return self._controller.core.reach.may_be_lost(self._controller.now_s())

    def is_silent(self, address: str) -> bool:
        """Whether its host did not answer when it was asked last."""
        return not self._answered.get(host_of(address), True)

    def heard(self, address: str) -> None:
        """An instance there has answered on its link."""
        host = host_of(address)
        if not is_here(host):
            self._note({host: True})

    async def look_for_silent(self) -> None:
        """Whether hosts that could not be reached answer again: instances may start there again."""
        core = self._controller.core
        silent = list(core.unreachable.silent.items())
        for (node, _), answered in zip(
            silent, await asyncio.gather(*(self._ask(address) for _, address in silent)), strict=True
        ):
            if answered:
                core.reached(node)
                self._controller.changed()

    async def _look(self) -> None:
        addresses = self._others()
        found = await asyncio.gather(*(self._ask(address) for address in addresses))
        answered: dict[str, bool] = {}
        for address, answer in zip(addresses, found, strict=True):
            answered[host_of(address)] = answered.get(host_of(address), False) or answer
        self._answered = answered
        self._note(answered)

    def _note(self, answered: dict[str, bool]) -> None:
        core = self._controller.core
        was_cut_off = core.reach.is_cut_off
        core.awake(self._controller.now_s())
        core.looked(answered, self._controller.now_s())
        if core.reach.is_cut_off != was_cut_off:
            self._controller.changed()

    def _others(self) -> list[str]:
        """Where instances and routers on other hosts listen, but for those that were given up already."""
        slots = [slot for slot in self._controller.core.slots.values() if slot.phase not in ("waiting", "lost")]
        addresses = [slot.address for slot in slots if slot.address and not slot.killed]
        return [address for address in addresses if not is_here(host_of(address))]


def host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def is_here(host: str) -> bool:
    """Whether it is this host, by a name or address of its own."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host in ("", "localhost", socket.gethostname())
    if ip.is_loopback or ip.is_unspecified:
        return True
    try:
        with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))  # only an own address can be bound
    except OSError:
        return False
    return True


async def answers(address: str) -> bool:
    """Whether the host there answers within ASK_S, by its kernel: a stopped process and a closed port are answers too."""
    try:
        async with asyncio.timeout(ASK_S):
            _, writer = await asyncio.open_connection(host_of(address), int(address.rpartition(":")[2]))
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except OSError:  # TimeoutError is one
        return False
    writer.transport.abort()
    return True
