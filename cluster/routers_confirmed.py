"""Whether the routers see every instance: `ready` is said to people only when each has a link to each."""

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from biphase.protos import router_pb2, router_pb2_grpc
from biphase.protos.grpc_setup import channel_options

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

CONFIRM_POLL_S = 0.03
CONFIRM_CALL_S = 2.0


class RoutersConfirmed:
    """Asks the routers after every change of what they should see. Decides nothing."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._seen: object = None

    @property
    def confirmed(self) -> bool:
        return self._seen == self._view()

    @property
    def ever_confirmed(self) -> bool:
        return self._seen is not None

    def was_confirmed_before(self) -> None:
        """An earlier life of the controller saw it."""
        self._seen = "an earlier life"

    async def run(self) -> None:
        controller = self._controller
        while True:
            view = self._view()
            if controller.core.all_up and self._seen != view:
                asked = (self._router_sees_all(address) for address in controller.router_addresses())
                if all(await asyncio.gather(*asked)) and self._view() == view:
                    self._seen = view
                    controller.changed()
                    continue
                await asyncio.sleep(CONFIRM_POLL_S)
            else:
                await controller.status.wait()

    def _view(self) -> object:
        """What the routers should see: a value to compare."""
        return self._controller.core.version, tuple(self._controller.router_addresses())

    async def _router_sees_all(self, address: str) -> bool:
        async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
            try:
                info = await router_pb2_grpc.RouterStub(channel).GetServerInfo(
                    router_pb2.GetServerInfoRequest(), timeout=CONFIRM_CALL_S
                )
            except grpc.aio.AioRpcError:
                return False
        there = {(view.name, view.incarnation): view.state for view in info.instances}
        return all(
            there.get((member.name, member.incarnation)) in (("ready", "draining") if member.draining else ("ready",))
            for member in self._controller.core.members
        )
