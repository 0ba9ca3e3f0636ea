"""What a handoff needs of the channel between an instance's ranks: protocols, and the exchange of endpoints.

Messages are maps with a "kind"; they arrive in the order in which they were sent, handlers run in the loop. The loss of
a rank ends the instance, so nothing here waits with a deadline.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from biphase.kvtransfer.signature import RankEndpoint

Message = dict[str, Any]


class LeaderLink(Protocol):
    """Rank 0's end of the channel."""

    @property
    def followers(self) -> Sequence[int]: ...

    def send(self, rank: int, message: Message) -> None: ...

    def broadcast(self, message: Message) -> None: ...

    def subscribe(self, kind: str, handler: Callable[[int, Message], None]) -> None: ...

    def unsubscribe(self, kind: str, *, keep: bool = False) -> None: ...


class FollowerLink(Protocol):
    """The end of any other rank."""

    def send(self, message: Message) -> None: ...

    def subscribe(self, kind: str, handler: Callable[[Message], None]) -> None: ...

    def unsubscribe(self, kind: str, *, keep: bool = False) -> None: ...


async def gather_endpoints(own: RankEndpoint, link: LeaderLink | None) -> tuple[RankEndpoint, ...]:
    """Every rank's endpoint, by rank; those of the others as they tell them."""
    if link is None:
        return (own,)
    told: dict[int, RankEndpoint] = {0: own}
    complete = asyncio.Event()

    def on_endpoint(rank: int, message: Message) -> None:
        told[rank] = RankEndpoint(**{**message["endpoint"], "transports": tuple(message["endpoint"]["transports"])})
        if len(told) == 1 + len(link.followers):
            complete.set()

    link.subscribe("kv.endpoint", on_endpoint)
    try:
        await complete.wait()
    finally:
        link.unsubscribe("kv.endpoint", keep=True)  # when all turn to another role they tell it anew
    return tuple(told[rank] for rank in sorted(told))


def tell_endpoint(own: RankEndpoint, link: FollowerLink) -> None:
    link.send({"kind": "kv.endpoint", "endpoint": {**asdict(own), "transports": list(own.transports)}})
