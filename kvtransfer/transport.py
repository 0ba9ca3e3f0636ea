"""The seam between a handoff and the wire that carries it. Pure: value types and protocols.

Everything on the wire is in request coordinates (layer, head and token ranges), never block ids, so a transport knows
neither pool. A new transport implements these three protocols for the reading side, and serves an ExportTable.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.signature import BYTES_DIGEST, KvSignatureValue
from biphase.protos.ids import TicketId


class SourceUnreachable(Exception):
    """The source does not answer, or the connection to it broke; one line."""


class SourceRefused(Exception):
    """The source answered no; one line of its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOrder:
    """What a reader asks of one source. With ``pieces_only`` (a second try) the stream has no trailer."""

    ticket: TicketId
    epoch: int
    incarnation: int
    box: KvBox
    codec: str = "raw"
    digest: str = BYTES_DIGEST
    pieces_only: bool = False


class FrameStream(Protocol):
    """The frames of one pull, each as received. Iteration raises SourceUnreachable or SourceRefused."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def break_off(self, reason: str) -> None:
        """End it from this side: iteration raises SourceUnreachable with ``reason``. Idempotent."""


class Source(Protocol):
    """A prefill instance as a reader sees it."""

    async def handshake(self, signature: KvSignatureValue, timeout_s: float) -> KvSignatureValue: ...

    def pull(self, order: PullOrder) -> FrameStream: ...

    async def release(self, ticket: TicketId, epoch: int, incarnation: int, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """Makes sources; one per kind of wire."""

    def open(self, address: str) -> Source: ...
