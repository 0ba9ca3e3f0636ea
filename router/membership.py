"""Who the instances are: the command line's static list, or the controller's stream.

Losing the controller changes nothing: the last membership stands, and the stream is opened again and again. Only the
highest epoch is obeyed, and within it the highest version.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from biphase.protos import controller_pb2, controller_pb2_grpc
from biphase.protos.convert import role_from_proto
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import channel_options
from biphase.protos.ids import Incarnation
from biphase.router.view import InstanceKey, Member

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 2.0

REPORT_EVERY_S = 1.0

Apply = Callable[[Sequence[Member], int], None]
"""Takes the members and the epoch they are of."""


def static_members(prefill: Sequence[str], decode: Sequence[str]) -> list[Member]:
    """Members that are only addresses; whichever incarnation answers there is taken."""
    members = [Member(key=InstanceKey(a), role="prefill", address=a, incarnation=Incarnation(0)) for a in prefill]
    members += [Member(key=InstanceKey(a), role="decode", address=a, incarnation=Incarnation(0)) for a in decode]
    return members


class MembershipWatch:
    """Follows one controller, and tells it ``report`` about once a second. ``run`` goes on until it is cancelled."""

    def __init__(self, address: str, report: Callable[[], controller_pb2.RouterReport], apply: Apply) -> None:
        self._address = address
        self._report = report
        self._apply = apply
        self._newest = (0, -1)  # epoch, version

    async def run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        async with grpc.aio.insecure_channel(self._address, options=channel_options()) as channel:
            stub = controller_pb2_grpc.ControllerStub(channel)
            while True:
                try:
                    async for membership in stub.WatchMembership(self._reports()):
                        backoff_s = FIRST_BACKOFF_S
                        self.take(membership)
                    reason = "it ended the stream"
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name} {one_line(Exception(error.details() or ''))}"
                except (KeyError, ValueError) as error:
                    reason = f"it sent a malformed membership: {one_line(error)}"
                logger.log(
                    logging.WARNING if backoff_s == FIRST_BACKOFF_S else logging.DEBUG,
                    "no membership from the controller at %s: %s; the last one stands",
                    self._address,
                    reason,
                )
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    async def _reports(self) -> AsyncIterator[controller_pb2.RouterReport]:
        """What the controller hears from us as long as the stream stands."""
        while True:
            yield self._report()
            await asyncio.sleep(REPORT_EVERY_S)

    def take(self, message: Any) -> None:
        """Apply one Membership message unless a newer one has been seen. Raises KeyError for an unknown role."""
        if (message.epoch, message.version) <= self._newest:
            return
        members = [
            Member(
                key=InstanceKey(member.name),
                role=role_from_proto(member.role),
                address=member.address,
                incarnation=Incarnation(member.incarnation),
                draining=member.draining,
                generation=member.generation,
                node=member.node,
            )
            for member in message.members
        ]
        self._newest = (message.epoch, message.version)
        self._apply(members, message.epoch)
