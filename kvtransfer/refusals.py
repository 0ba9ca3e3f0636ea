"""The calls that a rank of a prefill instance answers no, and what it says why. Pure."""

from typing import Literal

from biphase.kvtransfer import frames
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.tickets import ExportRefused, Refusal, short
from biphase.kvtransfer.wire import PullOrder

RefusedBecause = Literal["gone", "stale", "invalid"]
"""The ticket is not, or no longer; the call is meant for another life, model or epoch; it could never be served."""


class KvRefused(Exception):
    """A call that is answered no; the text is one line, for the reader."""

    def __init__(self, because: RefusedBecause, text: str) -> None:
        super().__init__(text)
        self.because = because

    @staticmethod
    def of(error: ExportRefused) -> "KvRefused":
        return KvRefused("stale" if error.refusal is Refusal.STALE_EPOCH else "gone", str(error))


def check_incarnation(ours: KvSignatureValue, meant: int) -> None:
    """Raises KvRefused for a call to another life."""
    if meant != ours.incarnation:
        text = f"{ours.instance} is incarnation {ours.incarnation}, the call is meant for incarnation {meant}"
        raise KvRefused("stale", text)


def check_order(order: PullOrder, ours: KvSignatureValue, memory: RankMemory, num_tokens: int) -> None:
    """Raises KvRefused for a box, codec or digest that cannot be served, of a ticket over ``num_tokens`` tokens."""
    if order.codec not in ours.codecs:
        raise KvRefused("invalid", f"codec {order.codec!r} is none of {', '.join(ours.codecs)}")
    if order.digest not in ours.digests:
        raise KvRefused("invalid", f"digest {order.digest!r} is none of {', '.join(ours.digests)}")
    box = order.box
    if not (memory.holds(box) and box.token_start <= box.token_end <= num_tokens):
        raise KvRefused(
            "invalid",
            f"a pull of {frames.where(box)} from ticket {short(order.ticket)} over "
            f"{frames.where(memory.box(num_tokens))}",
        )
