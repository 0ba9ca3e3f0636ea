"""Something to lose: waits until the load is on all instances and the victim of a fault has work in hand.

A decode instance has streams once the burst has been prefilled, a router too, and others see some of the load, by the load's first burst alone. What a prefill
instance has is gone in seconds, so that it gets a burst of its own while the others decode, and is hit with it in hand:
one that is killed with prompts aboard, a pair that is cut apart while one end pulls from the other.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from fault_outcome import Fault

from biphase.client.bench.arrivals import Arrival

BURST = 10
"""Requests that every case has at least, and begins with: its first indices."""
WORK_ON_VICTIM, PULLS_ON_PAIR = 4, 1
"""Streams of a victim when it is hit, prompts aboard a prefill instance; of a pair, pulls under way at its decode instance."""
AT_WORK_WITHIN_S, ONE_MORE_WITHIN_S = 30.0, 5.0
"""How long to wait for so many, and at first for one more: one of them may end just before it is hit."""
POLL_S = 0.02
STREAMING_TOKENS = 3
PROMPTS, PROMPT_OUTPUT = 6, 16
FIRST_INDEX = 1_000_000
"""Of the burst of prompts, so that it has none of the load's."""


class Live(Protocol):
    """A request in flight."""

    address: str
    tokens: list[int]


class Looks(Protocol):
    """What can be asked about a deployment under load."""

    async def legs_on(self, name: str) -> int | None: ...

    async def streams_on(self, name: str) -> int: ...

    async def open_pulls(self, name: str) -> int: ...


def prompt_burst(input_tokens: int) -> list[Arrival]:
    """For a prefill instance: at once, with short answers."""
    return [
        Arrival(index=FIRST_INDEX + number, at_s=0.0, phase=0, input_tokens=input_tokens, output_tokens=PROMPT_OUTPUT)
        for number in range(PROMPTS)
    ]


def needs_prompts(fault: Fault) -> bool:
    """Whether what the fault hits is at work only while prompts are prefilled."""
    return fault.role == "prefill" or fault.kind == "pair"


def work_needed(fault: Fault) -> int:
    return PULLS_ON_PAIR if fault.kind == "pair" else WORK_ON_VICTIM


async def at_work(
    looks: Looks, fault: Fault, live: Mapping[int, Live], address: str, send_prompts: Callable[[], None]
) -> int:
    """Wait until the victim has enough; returns how much it has. After a while it is what it is, and the goals tell.

    ``live``: the load's requests in flight; ``address``: of a faulted router."""

    async def streams() -> int:
        return sum(len(one.tokens) >= STREAMING_TOKENS and address in ("", one.address) for one in live.values())

    async def burst_streams() -> bool:
        of_burst = [one for index, one in live.items() if index < BURST]
        return max(live, default=0) >= BURST - 1 and all(len(one.tokens) >= STREAMING_TOKENS for one in of_burst)

    async def work() -> int:
        if fault.kind == "pair":
            found = await looks.open_pulls(fault.victim)
        elif fault.role == "decode":
            found = await looks.streams_on(fault.victim) if await burst_streams() else 0
        elif fault.role == "prefill":
            found = await looks.legs_on(fault.victim) or 0
        else:
            return await streams()
        return min(found, await streams())

    if needs_prompts(fault):
        await _reached(streams, WORK_ON_VICTIM, 0)
        send_prompts()
        return await _reached(work, work_needed(fault), 0)
    return await _reached(work, work_needed(fault), 1)


async def _reached(look: Callable[[], Awaitable[int]], enough: int, more_at_first: int) -> int:
    began_s = time.monotonic()
    while True:
        waited_s = time.monotonic() - began_s
        found = await look()
        if found >= enough + more_at_first * (waited_s < ONE_MORE_WITHIN_S) or waited_s > AT_WORK_WITHIN_S:
            return found
        await asyncio.sleep(POLL_S)
