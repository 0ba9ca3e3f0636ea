"""A router's end of a link, as small as it gets: opens legs on a worker and collects what comes back."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from biphase.protos import convert, worker_pb2, worker_pb2_grpc
from biphase.protos.grpc_setup import channel_options
from biphase.protos.values import LegOutcome, Sampling

ANSWER_WITHIN_S = 90.0
GREEDY = Sampling(max_tokens=8, ignore_eos=True)


class ClientLeg:
    """One leg and everything that was said of it. ``tokens``: by output index."""

    def __init__(self, link: "LinkClient", leg_id: int) -> None:
        self.link = link
        self.leg_id = leg_id
        self.refused: worker_pb2.Refused | None = None
        self.started: worker_pb2.Started | None = None
        self.handed_off: worker_pb2.HandedOff | None = None
        self.ended: worker_pb2.LegEnded | None = None
        self.tokens: dict[int, int] = {}
        self.finishes: list[int] = []
        self.changed = asyncio.Condition()

    async def until(self, reached: Callable[["ClientLeg"], object]) -> "ClientLeg":
        """Wait for ``reached``; raises when the leg ends, the link breaks or ANSWER_WITHIN_S pass without it."""
        async with asyncio.timeout(ANSWER_WITHIN_S), self.changed:
            await self.changed.wait_for(lambda: reached(self) or self.ended or self.refused or self.link.broken)
        assert reached(self), f"leg {self.leg_id}: {self.ended or self.refused or self.link.broken}"
        return self

    async def end(self) -> LegOutcome:
        await self.until(lambda leg: leg.ended)
        assert self.ended is not None
        return convert.outcome_from_proto(self.ended.outcome)

    @property
    def detail(self) -> str:
        return self.refused.detail if self.refused else self.ended.detail if self.ended else ""

    @property
    def text(self) -> list[int]:
        """The tokens in order of their index."""
        return [self.tokens[index] for index in sorted(self.tokens)]

    async def cancel(self, *, unless_handed_off: bool = False) -> None:
        cancel = worker_pb2.CancelLeg(leg_id=self.leg_id, reason="test", unless_handed_off=unless_handed_off)
        await self.link.send(cancel=cancel)


class LinkClient:
    """One link; use it with ``async with``, which returns when the worker has welcomed it or turned it away."""

    def __init__(self, address: str, *, incarnation: int = 0, name: str = "test", kind: str = "router", epoch: int = 0):
        self.address = address
        self.incarnation = incarnation
        self.welcome = worker_pb2.Welcome()
        self.load = worker_pb2.Load()
        self.num_loads = 0
        self.signals: list[worker_pb2.WorkerSignals] = []
        self.command_refused: list[worker_pb2.CommandRefused] = []
        self.heard = asyncio.Condition()
        """Of signals, refused commands and loads."""
        self.messages = 0
        self.broken: str = ""
        self.code: grpc.StatusCode | None = None
        self._hello = worker_pb2.Hello(peer_name=name, peer_kind=kind, membership_epoch=epoch)
        self._legs: dict[int, ClientLeg] = {}
        self._ids = itertools.count(1)
        self._welcomed = asyncio.Event()
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(self.address, options=options)
        self.stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._call = self.stub.Link()
        await self.send(hello=self._hello)
        self._reader = asyncio.create_task(self._read())
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await self._welcomed.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.break_off()
        await self._channel.close()

    async def break_off(self) -> None:
        """End the link as a dying router does."""
        self._call.cancel()
        self._reader.cancel()
        await asyncio.wait({self._reader})

    async def send(self, *, incarnation: int | None = None, **command: Any) -> None:
        meant = self.incarnation if incarnation is None else incarnation
        async with self._writing:  # gRPC takes one write of a call at a time
            await self._call.write(worker_pb2.LinkDown(incarnation=meant, **command))

    async def open_prefill(
        self, token_ids: Sequence[int], sampling: Sampling = GREEDY, *, forced: int = 0, refusals: int = 0
    ) -> ClientLeg:
        """``forced``: how many of the tokens are output already."""
        leg = self.new_leg()
        open_prefill = worker_pb2.OpenPrefill(
            leg_id=leg.leg_id,
            request_id=f"r{leg.leg_id}",
            token_ids=convert.pack_tokens(tuple(token_ids)),
            num_prompt_tokens=len(token_ids) - forced,
            sampling=convert.sampling_to_proto(sampling),
            refusals=refusals,
        )
        await self.send(open_prefill=open_prefill)
        return leg

    async def open_decode(
        self,
        token_ids: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        ticket: worker_pb2.KvTicket | None = None,
        epoch: int = 1,
        forced: int = 0,
    ) -> ClientLeg:
        """Without ``ticket`` the worker prefills itself."""
        leg = self.new_leg()
        open_decode = worker_pb2.OpenDecode(
            leg_id=leg.leg_id,
            request_id=f"r{leg.leg_id}",
            token_ids=convert.pack_tokens(tuple(token_ids)),
            num_prompt_tokens=len(token_ids) - forced,
            sampling=convert.sampling_to_proto(sampling),
            ticket=ticket,
            pull_epoch=epoch,
        )
        await self.send(open_decode=open_decode)
        return leg

    async def until_heard(self, reached: Callable[["LinkClient"], object]) -> None:
        """Wait for what a load, signals or a refused command bring."""
        async with asyncio.timeout(ANSWER_WITHIN_S), self.heard:
            await self.heard.wait_for(lambda: reached(self) or self.broken)
        assert reached(self), self.broken

    async def stats(self) -> dict[str, int]:
        reply = await self.stub.GetStats(worker_pb2.StatsRequest(), timeout=ANSWER_WITHIN_S)
        return dict(reply.counters)

    async def until_broken(self) -> str:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await self._reader
        return self.broken

    def new_leg(self) -> ClientLeg:
        leg = ClientLeg(self, next(self._ids))
        self._legs[leg.leg_id] = leg
        return leg

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.WhichOneof("event") == "welcome":
                    self.welcome, self.incarnation = message.welcome, message.incarnation
                    self._welcomed.set()
                    continue
                assert message.incarnation == self.incarnation
                self.messages += 1
                await self._take(message)
            self.code = await self._call.code()
            self.broken = await self._call.details() or "ended"
        except grpc.aio.AioRpcError as error:
            self.code, self.broken = error.code(), error.details() or "broken"
        self._welcomed.set()
        async with self.heard:
            self.heard.notify_all()
        for leg in self._legs.values():
            async with leg.changed:
                leg.changed.notify_all()

    async def _take(self, message: worker_pb2.LinkUp) -> None:
        event = message.WhichOneof("event")
        if event == "load":
            self.load, self.num_loads = message.load, self.num_loads + 1
            async with self.heard:
                self.heard.notify_all()
            return
        if event in ("signals", "command_refused"):
            getattr(self, event).append(getattr(message, event))
            async with self.heard:
                self.heard.notify_all()
            return
        if event == "tokens":
            step = message.tokens
            rows = zip(step.leg_ids, step.indices, step.token_ids, step.finish, strict=True)
            for leg_id, index, token, finish in rows:
                leg = self._legs[leg_id]
                assert index not in leg.tokens and leg.ended is None
                leg.tokens[index] = token
                leg.finishes.append(finish)
            touched = [self._legs[leg_id] for leg_id in step.leg_ids]
        else:
            assert event in ("refused", "started", "handed_off", "ended")
            said = getattr(message, event)
            leg = self._legs[said.leg_id]
            assert getattr(leg, event) is None, f"leg {said.leg_id}: a second {event}"
            setattr(leg, event, said)
            touched = [leg]
        for leg in touched:
            async with leg.changed:
                leg.changed.notify_all()


async def hand_over(
    prefill: LinkClient, decode: LinkClient, token_ids: Sequence[int], sampling: Sampling = GREEDY, *, forced: int = 0
) -> tuple[ClientLeg, ClientLeg | None]:
    """One request as a router runs it, to its end; returns both legs (None: it ended with its first token)."""
    first, refusals = await prefill.open_prefill(token_ids, sampling, forced=forced), 0
    await first.until(lambda leg: leg.started or leg.refused)
    while first.refused:
        refusals += 1
        first = await prefill.open_prefill(token_ids, sampling, forced=forced, refusals=refusals)
        await first.until(lambda leg: leg.started or leg.refused)
    assert first.started is not None
    if not first.started.HasField("ticket"):
        await first.end()
        return first, None
    second = await decode.open_decode(token_ids, sampling, ticket=first.started.ticket, forced=forced)
    await first.until(lambda leg: leg.tokens)
    if first.finishes[0]:
        await second.cancel()
    else:
        await second.end()
        # else the prefill leg waits for another reader, which a router would see to
        assert second.handed_off is not None, f"the handoff failed: {second.detail}"
    await first.end()
    return first, second
