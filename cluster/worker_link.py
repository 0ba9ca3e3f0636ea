"""The controller's own link to an instance: commands go down it, loads and signals come up, its silence is a death.

A broken link alone is no proof of death: the instance is asked once more on a fresh connection, and only an instance
that does not answer there within ``SECOND_OPINION_S`` is reported lost. One that is turning ends its links by itself and
is asked again and again; whoever set it turning bounds that.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Literal, Protocol

import grpc
import grpc.aio

from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import channel_options

WELCOME_S = 10.0
"""From the instance's `ready` to its first Welcome; a loaded host may take a while to schedule it."""
SECOND_OPINION_S = 0.8
"""Keepalive notices a stopped peer after at most 2 s; with this the whole stays below 3 s."""
TURNING_RETRY_S = 0.03
SUPERSEDED = "has given way to epoch"
"""In the words of a worker that obeys a later life of the controller."""
Told = Literal["told", "refused", "silent"]
"""What came of a word to a life that was replaced: it was welcomed, it is not there any more, or nobody answers."""
logger = logging.getLogger("biphase.cluster.link")


class LinkSink(Protocol):
    """Takes what comes up a link. Every call is quick."""

    def expected(self) -> tuple[int, ...]:
        """The incarnations that may answer: the present one, and the next where it is turning."""
        ...

    def welcomed(self, incarnation: int, welcome: worker_pb2.Welcome) -> None: ...

    def broken(self, incarnation: int) -> None: ...

    def loaded(self, incarnation: int, load: worker_pb2.Load) -> None: ...

    def signalled(self, incarnation: int, signals: worker_pb2.WorkerSignals) -> None: ...

    def refused(self, incarnation: int, command: str, detail: str) -> None:
        """What it was told is not done."""
        ...


class WorkerLink:
    """One instance's link over all its connections. ``hold`` keeps it; ``send`` is heard by the present connection."""

    def __init__(self, *, name: str, address: str, epoch: int, sink: LinkSink) -> None:
        self.name, self.address = name, address
        self.superseded = False
        """The instance obeys a later life of the controller."""
        self.refused = False
        """Somebody answered there, who is not the instance or wants no link."""
        self._epoch, self._sink = epoch, sink
        self._outgoing: asyncio.Queue[worker_pb2.LinkDown | None] = asyncio.Queue()
        self._incarnation = 0

    def send(self, command: worker_pb2.LinkDown) -> None:
        """Say it to whoever has welcomed us; what is not sent when the connection breaks is not sent again."""
        command.incarnation = self._incarnation
        self._outgoing.put_nowait(command)

    async def hold(self, welcome_s: float = WELCOME_S) -> str:
        """Keep the link as long as the instance lives; returns why it is lost. Cancel to let go. ``welcome_s``: how long
        the first Welcome may take."""
        _, reason = await self._hold_once(welcome_s)
        while True:
            logger.info("%s: link broke (%s), asking once more", self.name, reason)
            welcomed, again = await self._hold_once(SECOND_OPINION_S)
            if welcomed:
                reason = again
            elif len(self._sink.expected()) > 1:
                await asyncio.sleep(TURNING_RETRY_S)
            else:
                return reason

    async def _hold_once(self, welcome_s: float) -> tuple[bool, str]:
        """One connection from Hello to its break; returns whether it was welcomed, and why it broke."""
        hello = worker_pb2.Hello(peer_name="controller", peer_kind="controller", membership_epoch=self._epoch)
        outgoing: asyncio.Queue[worker_pb2.LinkDown | None] = asyncio.Queue()
        self._outgoing = outgoing

        async def commands() -> AsyncIterator[worker_pb2.LinkDown]:
            yield worker_pb2.LinkDown(hello=hello)  # whoever you are; who answers is looked at below
            while (command := await outgoing.get()) is not None:
                yield command

        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]  # a second opinion: a fresh connection
        welcomed = self.refused = False
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Link(commands(), wait_for_ready=True)
            try:
                first = await asyncio.wait_for(call.read(), welcome_s)
                if not isinstance(first, worker_pb2.LinkUp) or first.WhichOneof("event") != "welcome":
                    self.refused = True
                    return False, "it closed the link before its Welcome"
                if first.welcome.name != self.name or first.incarnation not in self._sink.expected():
                    self.refused = True
                    return False, f"{first.welcome.name}#{first.incarnation} answers in its place"
                welcomed, self._incarnation = True, first.incarnation
                self._sink.welcomed(first.incarnation, first.welcome)
                async for message in _messages(call):
                    match message.WhichOneof("event"):
                        case "load":
                            self._sink.loaded(message.incarnation, message.load)
                        case "signals":
                            self._sink.signalled(message.incarnation, message.signals)
                        case "command_refused":
                            refusal = message.command_refused
                            self._sink.refused(message.incarnation, refusal.command, refusal.detail)
                return welcomed, f"it ended the link: {one_line(Exception(await call.details()))}"
            except TimeoutError:
                return welcomed, f"no answer within {welcome_s:g} s"
            except grpc.aio.AioRpcError as error:
                details = one_line(Exception(error.details()))
                self.superseded = self.superseded or SUPERSEDED in details
                self.refused = not welcomed and error.code() != grpc.StatusCode.UNAVAILABLE
                return welcomed, f"{error.code().name}: {details}"
            finally:
                outgoing.put_nowait(None)
                call.cancel()
                if welcomed:
                    self._sink.broken(self._incarnation)


async def _messages(
    call: "grpc.aio.StreamStreamCall[worker_pb2.LinkDown, worker_pb2.LinkUp]",
) -> AsyncIterator[worker_pb2.LinkUp]:
    while isinstance(message := await call.read(), worker_pb2.LinkUp):
        yield message


async def retire(address: str, incarnation: int, epoch: int, reason: str, within_s: float) -> Told:
    """Tell a life that was replaced to end. Refused: another life answers there, or its host does and nobody listens."""
    hello = worker_pb2.Hello(peer_name="controller", peer_kind="controller", membership_epoch=epoch)
    done = asyncio.Event()

    async def commands() -> AsyncIterator[worker_pb2.LinkDown]:
        yield worker_pb2.LinkDown(incarnation=incarnation, hello=hello)
        yield worker_pb2.LinkDown(incarnation=incarnation, retire=worker_pb2.Retire(reason=reason))
        await done.wait()

    options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Link(commands())
        told: Told = "silent"
        try:
            async with asyncio.timeout(within_s):
                async for message in _messages(call):
                    told = "told" if message.WhichOneof("event") == "welcome" else told
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as error:
            if told == "silent" and _is_not_there(error):
                told = "refused"
        finally:
            done.set()
            call.cancel()
        return told


def _is_not_there(error: grpc.aio.AioRpcError) -> bool:
    """Whether the host answers, and the life that was meant does not live there."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return SUPERSEDED not in details
    return error.code() is grpc.StatusCode.UNAVAILABLE and "Connection refused" in details
