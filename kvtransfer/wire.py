"""The seam between a handoff and the wires that carry it. Pure: value types and protocols.

Everything on a wire is in request coordinates (layer, head and token ranges of the whole model), never block ids, so a wire
knows neither pool. A frame is a 64 byte header (frames.py) and a payload; wires differ in how the payload travels: behind
its header in one stream (grpc, tcp), or out of band with a reference in its place (shm, cuda_ipc, nixl, dist).

Serving end: the service (service.py) packs and seals, a FrameSink takes the frames of one pull to their reader.
Reading end: a Source is one rank of a prefill instance, its FrameStream yields Arrivals, whose payload the puller takes.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.signature import BYTES_DIGEST, KvSignatureValue
from biphase.protos.ids import TicketId

TRANSPORTS = ("cuda_ipc", "shm", "nixl", "dist", "tcp", "grpc")
"""All there are, the fastest first where both ends can."""


class SourceUnreachable(Exception):
    """The source does not answer, or the connection to it broke; one line."""


class NotReady(ConnectionError):
    """A plane's group of two is still being built: no failure, and later pulls find it; one line."""


class SourceRefused(Exception):
    """The source answered no; one line of its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOrder:
    """What a reader asks of one rank of a source. With ``pieces_only`` (a second try, or a rank that is not rank 0) the
    stream has no trailer. An empty ``box`` (token_start == token_end) asks for the trailer alone."""

    ticket: TicketId
    epoch: int
    incarnation: int
    box: KvBox
    codec: str = "raw"
    digest: str = BYTES_DIGEST
    pieces_only: bool = False


class Arrival(Protocol):
    """One frame as it comes in. Its payload is taken once, whole, or left: the stream's next step skips what was left."""

    @property
    def header(self) -> bytes:
        """64 bytes, unchecked."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of payload on the wire, whatever the header says."""
        ...

    @property
    def scatters(self) -> bool:
        """Whether ``read_into`` saves a copy: the bytes are still in the socket."""
        ...

    async def payload(self) -> Any:
        """The payload as one buffer (a memoryview, or a tensor on a GPU), valid until the stream goes on."""
        ...

    async def read_into(self, parts: Sequence[memoryview]) -> None:
        """Write the payload into ``parts``, whose sizes sum to ``num_bytes``. When it returns or raises, cancelled too,
        nothing writes there any more."""
        ...

    def intact(self) -> bool:
        """Asked after the payload was used: False where the source has meanwhile given its memory to something else."""
        ...


class FrameStream(Protocol):
    """The frames of one pull. Iteration raises SourceUnreachable or SourceRefused."""

    def __aiter__(self) -> AsyncIterator[Arrival]: ...

    def break_off(self, reason: str) -> None:
        """End it from this side: iteration raises SourceUnreachable with ``reason``. Idempotent."""


class Source(Protocol):
    """One rank of a prefill instance as a reader sees it, over one wire."""

    async def handshake(self, signature: KvSignatureValue, timeout_s: float) -> KvSignatureValue: ...

    def pull(self, order: PullOrder) -> FrameStream: ...

    async def release(
        self, ticket: TicketId, epoch: int, incarnation: int, timeout_s: float, num_bytes: int = 0
    ) -> None:
        """``num_bytes``: of payload that has arrived, on all ranks; 0: not said."""
        ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """Makes sources; one per kind of wire and process."""

    name: str

    def open(self, address: str) -> Source:
        """``address``: of the wire's own listener, ``host:port``."""
        ...

    async def close(self) -> None:
        """After its sources: what they shared."""
        ...


class Room(Protocol):
    """Memory of a sink for one payload: pack into ``payload``, then send or drop it."""

    @property
    def payload(self) -> Any:
        """A writable buffer of the size asked for (a memoryview, or a tensor on a GPU)."""
        ...


class FrameSink(Protocol):
    """Takes the frames of one pull to their reader; one task uses it. Raises ConnectionError when the reader is gone."""

    @property
    def gathers(self) -> bool:
        """Whether ``send`` takes the pool's own memory in parts, so that nothing needs packing."""
        ...

    def piece_bytes(self, message_bytes: int) -> int:
        """How large pieces pay on this wire, where messages of ``message_bytes`` do on any."""
        ...

    async def room(self, num_bytes: int) -> Room:
        """Waits until there is room: this is the back-pressure."""
        ...

    async def send(self, header: bytes, payload: "Room | Sequence[memoryview] | bytes") -> None:
        """When it returns or raises, cancelled too, the memory behind ``payload`` is no longer read on our account."""
        ...

    async def abort(self, header: bytes, payload: "Room | Sequence[memoryview] | bytes", share: float) -> None:
        """For drills: as ``send``, but break the wire after ``share`` of the frame, as hard as this one can be broken, in
        mid-frame where it can. The reader is told nothing."""
        ...

    def close(self) -> None:
        """The pull is over, however it ended: rooms that the reader has not taken are void. Idempotent."""
        ...


class PayloadSender(Protocol):
    """Serving end of an out-of-band data plane, for one pull. The frames' stream (tcp) carries what ``send`` returns."""

    answer: bytes
    """What the reader must know before the first payload (msgpack)."""

    def piece_bytes(self, message_bytes: int) -> int:
        """As FrameSink's; no room is asked for that is larger."""
        ...

    async def room(self, num_bytes: int) -> Room: ...

    async def send(self, room: Room) -> bytes:
        """A reference to the payload, at most 255 bytes."""
        ...

    def taken(self, reference: bytes) -> None:
        """The reader has done with it."""
        ...

    def close(self) -> None: ...


class PayloadReceiver(Protocol):
    """Reading end of an out-of-band data plane, for one pull."""

    hello: bytes
    """What the serving end must know (msgpack); goes with the pull's request."""

    async def start(self, answer: bytes) -> None: ...

    async def fetch(self, reference: bytes, num_bytes: int) -> Any:
        """The payload as one buffer, valid until it is given back by ``done``."""
        ...

    def intact(self, reference: bytes) -> bool: ...

    def done(self, reference: bytes) -> None: ...

    def close(self) -> None: ...


class DataPlane(Protocol):
    """An out-of-band way for payloads, one per process and kind; both ends of a process share it."""

    name: str

    async def sender(self, hello: bytes, peer: str) -> PayloadSender:
        """For a pull whose reader said ``hello``. Raises ConnectionError, one line, where it cannot serve that reader."""
        ...

    async def receiver(self, peer: str) -> PayloadReceiver:
        """For a pull from ``peer`` (host:port of its tcp listener)."""
        ...

    async def close(self) -> None: ...
