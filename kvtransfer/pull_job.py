"""One rank's part in a pull, as rank 0 gives it out, and what came of it. Pure."""

from dataclasses import asdict, dataclass
from typing import Any

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.frames import Trailer
from biphase.protos.ids import BlockId, TicketId

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One way to a source: a transport and the address of its listener."""

    transport: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPart:
    """What comes from one rank of the source. ``routes``: the best first; the next where one fails. An empty box asks for
    the trailer alone."""

    source_rank: int
    box: KvBox
    with_trailer: bool
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullJob:
    """Everything that one rank pulls of one ticket into ``blocks``. ``group_size``: the source's block size.
    ``beside_decode``: whether the instance decodes meanwhile, as far as rank 0 knew."""

    ticket: TicketId
    epoch: int
    instance: str
    incarnation: int
    blocks: tuple[BlockId, ...]
    group_size: int
    codec: str
    digest: str
    timeout_s: float
    beside_decode: bool
    parts: tuple[PullPart, ...]

    def to_message(self) -> Message:
        return {**asdict(self), "blocks": list(self.blocks), "parts": [asdict(part) for part in self.parts]}

    @staticmethod
    def from_message(message: Message) -> "PullJob":
        parts = tuple(
            PullPart(
                source_rank=part["source_rank"],
                box=KvBox(**part["box"]),
                with_trailer=part["with_trailer"],
                routes=tuple(Route(**route) for route in part["routes"]),
            )
            for part in message["parts"]
        )
        return PullJob(**{**message, "blocks": tuple(message["blocks"]), "parts": parts})


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsPulled:
    """A rank has everything of its job. ``sampled_s``: when token 0 was sampled, on its own clock; see SourceClock for what
    that may be off by. By part, ``carried_by``: the transport that brought the last of it, ``instead``: why that and not
    the first choice, empty where it was. ``tail_*``: what timing.Tail has seen."""

    num_bytes: int
    num_bad: int
    fallbacks: int
    bytes_by_transport: dict[str, int]
    carried_by: list[str]
    instead: list[str]
    trailer: Trailer | None = None
    sampled_s: float = 0.0
    tail_raw_bytes: int = 0
    tail_wire_bytes: int = 0
    tail_s: float = 0.0
