"""What a router sees of its requests, as its report counts it. Pure values in and out."""

from biphase.protos.errors import BiphaseError, Cancelled, DeadlinePassed, InvalidRequest, Overloaded
from biphase.router.report import Ending, Running
from biphase.router.request import Request
from biphase.router.validate import Asked


def seen_by(request: Request, now_s: float) -> Running:
    """What its client has seen so far: arrival to first token, and the pace since. A silence after the last token counts:
    with the next one the pace is at least that."""
    record, tokens = request.record, request.num_output_tokens
    first_s, last_s = record.first_token_s, record.last_token_s
    ttft_ms = ((now_s if first_s is None else first_s) - record.arrived_s) * 1e3
    tpot_ms = None
    if tokens > 1 and first_s is not None and last_s is not None:
        tpot_ms = max((last_s - first_s) / (tokens - 1), (now_s - first_s) / tokens) * 1e3
    return Running(output_tokens=tokens, ttft_ms=ttft_ms, tpot_ms=tpot_ms)


def ending_of(error: BaseException | None) -> Ending:
    """How a request ended. Anything that is no error of ours is a client that has gone."""
    match error:
        case None:
            return "finished"
        case DeadlinePassed():
            return "expired"
        case Overloaded():
            return "refused"
        case InvalidRequest() | Cancelled():
            return "cancelled"
        case BiphaseError():
            return "failed"
    return "cancelled"


def num_chars(asked: Asked) -> int:
    """Of the prompt's text; 0 where it came as tokens."""
    return len(asked.text or "") + sum(len(content) for _, content in asked.chat or ())
