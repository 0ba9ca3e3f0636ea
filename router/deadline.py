"""Whether it was the deadline that took a client away. Pure.

At a deadline three clocks run out together: that of the client's gRPC, which resets the stream, that of ours, which ends the
handler, and the router's own. Whichever comes first, the request has expired; it was not cancelled.
"""

MARGIN_S = 0.05
"""The client's clock began before ours, by the way of the request to here."""
MARGIN_SHARE = 0.01
"""gRPC rounds a timeout up on its way, by at most so much of it."""


def has_run_out(now_s: float, *, arrived_s: float, deadline_s: float | None) -> bool:
    """Whether a client that is seen gone now has gone by its deadline (None: it had set none)."""
    if deadline_s is None:
        return False
    return now_s >= deadline_s - MARGIN_S - MARGIN_SHARE * (deadline_s - arrived_s)
