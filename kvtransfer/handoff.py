"""One rank's side of one handoff on the decode side, as a sans-I/O machine. Pure: no clock, no gRPC, no torch, no threads.

The driver feeds it what happens and does what the state says. A rank takes boxes from several ranks of the source at once,
disjoint ones; rank 0 takes the trailer too, and releases when every rank is in RELEASING, which for the others is their
last word:

    state       event            next        the driver
    CONNECTING  Connected        PULLING     opens the pulls of everything
    PULLING     PieceArrived     PULLING     has written the piece where ``admit`` let it
    PULLING     TrailerArrived   PULLING
    PULLING     AllArrived       RELEASING   sends Release
    PULLING     SomeMissing      REPAIRING   asks for ``wanted`` again, in the same epoch
    REPAIRING   PieceArrived     REPAIRING   as above
    REPAIRING   TrailerArrived   REPAIRING
    REPAIRING   AllArrived       RELEASING   sends Release
    REPAIRING   SomeMissing      FAILED      twice bad
    RELEASING   Acknowledged     DONE
    any live    Lost             FAILED      the source is gone, silent or refuses
    any live    CancelAsked      CANCELLED

Nothing is believed before it is checked: a piece is written where its header fits the layout and the request and none of
it has arrived before, and counts when its digest is right as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kvtransfer.frames import FrameError, Header, Trailer, check_piece, where
from biphase.kvtransfer.pieces import Coverage


class LocalHandoffError(Exception):
    """The driver did what the state does not allow: a bug of ours."""


class State(Enum):
    CONNECTING = "connecting"
    PULLING = "pulling"
    REPAIRING = "repairing"
    RELEASING = "releasing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Connected:
    """Both signatures agree."""


@dataclass(frozen=True, slots=True)
class PieceArrived:
    """A piece that passed every check."""

    box: KvBox


@dataclass(frozen=True, slots=True)
class TrailerArrived:
    """Token 0 is known."""

    trailer: Trailer


@dataclass(frozen=True, slots=True)
class AllArrived:
    """The streams are at their end and nothing is missing."""


@dataclass(frozen=True, slots=True)
class SomeMissing:
    """The streams are at their end and pieces, or the trailer, are missing."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Release is on its way."""


@dataclass(frozen=True, slots=True)
class Lost:
    """It cannot go on; one line why."""

    reason: str


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Whoever wanted the KV no longer does."""


Event = Connected | PieceArrived | TrailerArrived | AllArrived | SomeMissing | Acknowledged | Lost | CancelAsked

_LIVE = (State.CONNECTING, State.PULLING, State.REPAIRING, State.RELEASING)
TABLE: dict[tuple[State, type[Event]], State] = {
    (State.CONNECTING, Connected): State.PULLING,
    (State.PULLING, PieceArrived): State.PULLING,
    (State.PULLING, TrailerArrived): State.PULLING,
    (State.PULLING, AllArrived): State.RELEASING,
    (State.PULLING, SomeMissing): State.REPAIRING,
    (State.REPAIRING, PieceArrived): State.REPAIRING,
    (State.REPAIRING, TrailerArrived): State.REPAIRING,
    (State.REPAIRING, AllArrived): State.RELEASING,
    (State.REPAIRING, SomeMissing): State.FAILED,
    (State.RELEASING, Acknowledged): State.DONE,
    **{(state, Lost): State.FAILED for state in _LIVE},
    **{(state, CancelAsked): State.CANCELLED for state in _LIVE},
}


class Handoff:
    """One try to get one request's KV, or this rank's part of it. Owned by the pull that drives it.

    ``layout``: of the whole model, with the block size that pieces are packed by. ``boxes``: disjoint, what each source
    is asked for; empty ones are nothing to wait for.
    """

    def __init__(self, *, layout: KvLayout, epoch: int, boxes: Sequence[KvBox], with_trailer: bool = True) -> None:
        self.state = State.CONNECTING
        self.trailer: Trailer | None = None
        self.reason = ""
        self.num_bad = 0
        self.num_bytes = 0
        self.computed_tokens = 0
        self.last_bad = ""
        self._layout = layout
        self._epoch = epoch
        self._with_trailer = with_trailer
        self._coverages = {box: Coverage(box) for box in boxes if box.num_tokens}

    def on(self, event: Event) -> State:
        """Step by the table. Raises LocalHandoffError where the table has no such step."""
        step = (self.state, type(event))
        if step not in TABLE:
            raise LocalHandoffError(f"{type(event).__name__} cannot happen in state {self.state.value}")
        self.state = TABLE[step]
        match event:
            case PieceArrived(box):
                self.num_bytes += box.num_bytes(self._layout)
            case TrailerArrived(trailer):
                self.trailer = trailer
            case Lost(reason):
                self.reason = reason
            case SomeMissing() if self.state is State.FAILED:
                self.reason = f"a piece was bad twice ({self.last_bad})" if self.last_bad else "pieces never came"
            case _:
                pass
        return self.state

    def admit(self, header: Header, box: KvBox, wanted: KvBox, codec: str = "raw") -> None:
        """Whether a piece of a pull of ``wanted``, all or part of ``box``, may be written, if only its digest is right.
        Raises FrameError."""
        self._check_epoch(header)
        check_piece(header, self._layout, wanted, codec)
        if box not in self._coverages or not self._coverages[box].is_free(header.box):
            raise FrameError(f"a piece at {where(header.box)} came twice")

    def piece_arrived(self, header: Header, box: KvBox) -> None:
        """An admitted piece is written and its digest is right."""
        if not self._coverages[box].add(header.box):
            raise LocalHandoffError(f"a piece at {where(header.box)} was never admitted")
        self.on(PieceArrived(header.box))
        self.heard(header)

    def heard(self, header: Header) -> None:
        """Any frame whose digest is right. Raises FrameError for one of another epoch."""
        self._check_epoch(header)
        self.computed_tokens = max(self.computed_tokens, header.computed_tokens)

    def _check_epoch(self, header: Header) -> None:
        if header.epoch != self._epoch:
            raise FrameError(f"a frame of epoch {header.epoch} in a pull of epoch {self._epoch}")

    def reject(self, reason: str) -> None:
        """A frame that is of no use; what it should have brought is missing at the stream's end."""
        self.num_bad += 1
        self.last_bad = reason

    def streams_ended(self) -> State:
        """All streams, or the last of the second tries, have come to their end in good order."""
        arrived = all(coverage.complete for coverage in self._coverages.values())
        return self.on(AllArrived() if arrived and not self.wants_trailer else SomeMissing())

    @property
    def wants_trailer(self) -> bool:
        return self._with_trailer and self.trailer is None

    def missing(self, box: KvBox) -> list[KvBox]:
        """What of one of the boxes has not arrived."""
        return self._coverages[box].missing() if box in self._coverages else []
