"""The controller's own link to an instance: how it learns that the instance is gone or stopped.

A broken link alone is no proof of death: the instance is asked once more on a fresh connection, and only an instance
that does not answer there within ``SECOND_OPINION_S`` is reported lost.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import channel_options

WELCOME_S = 10.0
"""From the instance's `ready` to its first Welcome; a loaded host may take a while to schedule it."""
SECOND_OPINION_S = 0.8
"""Keepalive notices a stopped peer after at most 2 s; with this the whole stays below 3 s."""
logger = logging.getLogger("biphase.cluster.link")


async def hold_link(
    *, name: str, address: str, incarnation: int, epoch: int, on_welcome: Callable[[worker_pb2.Welcome], None]
) -> str:
    """Keep a link to the instance as long as it lives; returns why it is lost. Cancel to let go."""
    reason = await _hold_once(address, incarnation, epoch, WELCOME_S, on_welcome)
    while True:
        logger.info("%s#%d: link broke (%s), asking once more", name, incarnation, reason)
        welcomed = False

        def on_second_welcome(welcome: worker_pb2.Welcome) -> None:
            nonlocal welcomed
            welcomed = True
            on_welcome(welcome)

        again = await _hold_once(address, incarnation, epoch, SECOND_OPINION_S, on_second_welcome)
        if not welcomed:
            return reason
        reason = again


async def _hold_once(
    address: str,
    incarnation: int,
    epoch: int,
    welcome_s: float,
    on_welcome: Callable[[worker_pb2.Welcome], None],
) -> str:
    """One connection from Hello to its break; returns why it broke."""
    hello = worker_pb2.LinkDown(
        incarnation=incarnation,
        hello=worker_pb2.Hello(peer_name="controller", peer_kind="controller", membership_epoch=epoch),
    )

    async def commands() -> AsyncIterator[worker_pb2.LinkDown]:
        yield hello
        await asyncio.Event().wait()  # the stream stays open; the controller commands nothing on it

    options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]  # a second opinion needs a fresh connection
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Link(commands(), wait_for_ready=True)
        try:
            first = await asyncio.wait_for(call.read(), welcome_s)
            if not isinstance(first, worker_pb2.LinkUp) or first.WhichOneof("event") != "welcome":
                return "it closed the link before its Welcome"
            on_welcome(first.welcome)
            while await call.read() is not grpc.aio.EOF:
                pass  # loads are for routers
            return f"it ended the link: {one_line(Exception(await call.details()))}"
        except TimeoutError:
            return f"no answer within {welcome_s:g} s"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {one_line(Exception(error.details()))}"
        finally:
            call.cancel()
