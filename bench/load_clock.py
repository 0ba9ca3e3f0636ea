"""Requests of loads that began at different moments, on one clock. Pure."""

from collections.abc import Iterable
from dataclasses import replace

from biphase.client.bench.measured import Measured


def shifted(measured: Iterable[Measured], by_s: float) -> list[Measured]:
    """The same requests on the clock of a load that began ``by_s`` earlier."""
    return [
        replace(
            one,
            due_s=one.due_s + by_s,
            sent_s=one.sent_s + by_s,
            ended_s=one.ended_s + by_s,
            token_at_s=tuple(at_s + by_s for at_s in one.token_at_s),
        )
        for one in measured
    ]
