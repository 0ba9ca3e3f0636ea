"""What instances say they hold, and waiting until it is nothing: how benches see that a fault has leaked nothing."""

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

import grpc.aio

from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.grpc_setup import channel_options


class Counted(Protocol):
    """A deployment whose instances can be asked."""

    async def worker_counters(self) -> dict[str, dict[str, int]]: ...


async def counters_at(address: str, timeout_s: float = 1.0) -> dict[str, int]:
    """An instance's own; empty when it does not answer."""
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        try:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return dict((await stub.GetStats(worker_pb2.StatsRequest(), timeout=timeout_s)).counters)
        except grpc.aio.AioRpcError:
            return {}


LIVE = (
    "blocks_used",
    "legs",
    "sequences",
    "queued",
    "queued_tokens",
    "running",
    "tickets",
    "open_pulls",
    "running_sends",
)
"""Counters of an instance that are 0 when it has nothing to do."""


def held(counters: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """What is not back to zero; an instance that does not answer may hold anything."""
    silent = {f"{name} does not answer": 1 for name, of in counters.items() if not of}
    return silent | {f"{name}.{key}": of[key] for name, of in counters.items() for key in LIVE if of.get(key)}


async def wait_idle(cluster: Counted, within_s: float) -> dict[str, int]:
    """Wait until every counter is back; what is left when they are not in time."""
    deadline = time.monotonic() + within_s
    while True:
        counters = await cluster.worker_counters()
        left = held(counters)
        if (counters and not left) or time.monotonic() > deadline:
            return left if counters else {"no instance answers": 1}
        await asyncio.sleep(0.1)
