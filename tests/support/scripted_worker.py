"""An instance that does only what a test tells it to, over the real link protocol and a real socket.

A test double for faults of scheduling alone: orders of events, refusals, deaths and silences that a real instance
shows too rarely to be waited for. It computes nothing.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Self

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.protos import common_pb2, worker_pb2
from biphase.protos.convert import load_to_proto, role_to_proto, stats_to_proto
from biphase.protos.grpc_setup import bind, server_options, service_handler
from biphase.protos.values import LegStats, Load, Role

WITHIN_S = 10.0


class ScriptedWorker:
    """``async with ScriptedWorker("prefill") as p:`` listens; ``next`` gives commands, the other methods send events."""

    def __init__(
        self,
        role: Role,
        *,
        name: str = "",
        incarnation: int = 7,
        num_blocks: int = 100,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_queued_tokens: int = 1024,
        max_model_len: int = 200,
        model_hash: bytes = b"hash",
        port: int = 0,
    ) -> None:
        self.role: Role = role
        self.name = name or f"{role}-0"
        self.incarnation = incarnation
        self.port = port
        self.hellos: list[worker_pb2.LinkDown] = []
        self.commands: asyncio.Queue[worker_pb2.LinkDown] = asyncio.Queue()
        self.linked = asyncio.Event()
        self.unlinked = asyncio.Event()
        self.is_mute = False
        """Say no Welcome."""
        self._outgoing: asyncio.Queue[worker_pb2.LinkUp | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None
        self.welcome = worker_pb2.Welcome(
            name=self.name,
            role=role_to_proto(role),
            pid=4242,
            model=common_pb2.ModelInfo(
                name="toy",
                model_hash=model_hash,
                vocab_size=256,
                max_model_len=max_model_len,
                eos_token_ids=[0],
                architecture="llama",
                dtype="float32",
            ),
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_queued_tokens=max_queued_tokens,
        )

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.die()

    async def listen(self) -> None:
        self._server = grpc.aio.server(options=server_options())
        self._server.add_generic_rpc_handlers(
            (service_handler(worker_pb2.DESCRIPTOR, "Worker", self, GetMessageClass),)
        )
        self.port = bind(self._server, "127.0.0.1", self.port)
        await self._server.start()

    async def die(self) -> None:
        """End at once, as a killed process does."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def restart(self) -> None:
        """The next incarnation at the same address."""
        await self.die()
        self.incarnation += 1
        self.linked.clear()
        self.unlinked.clear()
        self.commands = asyncio.Queue()
        self._outgoing = asyncio.Queue()
        await self.listen()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def label(self) -> str:
        return f"{self.name}#{self.incarnation} (pid 4242)"

    # ---- the service

    async def GetStats(self, request: worker_pb2.StatsRequest, context: Any) -> worker_pb2.WorkerStats:
        return worker_pb2.WorkerStats(name=self.name, incarnation=self.incarnation)

    async def Link(self, requests: Any, context: Any) -> Any:
        hello = await anext(aiter(requests))
        self.hellos.append(hello)
        if hello.incarnation not in (0, self.incarnation):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"incarnation {self.incarnation} lives here")
        reading = asyncio.create_task(self._read(requests))
        try:
            if not self.is_mute:
                yield worker_pb2.LinkUp(incarnation=self.incarnation, welcome=self.welcome)
                self.linked.set()
            while (message := await self._outgoing.get()) is not None:
                yield message
        finally:
            reading.cancel()
            self.unlinked.set()

    async def _read(self, requests: Any) -> None:
        async for message in requests:
            self.commands.put_nowait(message)

    # ---- what tests wait for

    async def next(self, kind: str) -> Any:
        """The next command, which has to be of this kind."""
        async with asyncio.timeout(WITHIN_S):
            command = await self.commands.get()
        assert command.incarnation == self.incarnation
        assert command.WhichOneof("command") == kind, command
        return getattr(command, kind)

    async def wait_linked(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            await self.linked.wait()

    # ---- what tests make it say

    def send(self, *, incarnation: int | None = None, **event: Any) -> None:
        number = self.incarnation if incarnation is None else incarnation
        self._outgoing.put_nowait(worker_pb2.LinkUp(incarnation=number, **event))

    def hang_up(self) -> None:
        """End the stream in good order."""
        self._outgoing.put_nowait(None)

    def load(self, **load: Any) -> None:
        values = {"free_blocks": self.welcome.num_blocks, "room_blocks": self.welcome.num_blocks, **load}
        self.send(load=load_to_proto(Load(**values)))

    def refuse(self, leg_id: int, reason: int = worker_pb2.REFUSAL_BUSY, detail: str = "", queued: int = 0) -> None:
        refused = worker_pb2.Refused(leg_id=leg_id, reason=reason, detail=detail, queued_tokens=queued)
        self.send(refused=refused)

    def start(self, leg_id: int, *, ticket: bool = True) -> None:
        kv_ticket = None
        if ticket:
            kv_ticket = worker_pb2.KvTicket(
                id=leg_id.to_bytes(16, "little"),
                kv_address="127.0.0.1:1",
                instance=self.name,
                incarnation=self.incarnation,
                num_tokens=1,
            )
        self.send(started=worker_pb2.Started(leg_id=leg_id, ticket=kv_ticket, queue_ms=1.5))

    def hand_off(self, leg_id: int, first_token: int | None = None) -> None:
        self.send(
            handed_off=worker_pb2.HandedOff(leg_id=leg_id, bytes=4096, ms=2.0, exposed_ms=1.0, first_token=first_token)
        )

    def tokens(
        self, leg_id: int, first_index: int, token_ids: Sequence[int], finish: int = 0, *, per_message: int = 1
    ) -> None:
        """One message after the other, the last token with ``finish``."""
        finishes = [0] * (len(token_ids) - 1) + [finish]
        for start in range(0, len(token_ids), per_message):
            ids = token_ids[start : start + per_message]
            self.send(
                tokens=worker_pb2.StepTokens(
                    leg_ids=[leg_id] * len(ids),
                    indices=range(first_index + start, first_index + start + len(ids)),
                    token_ids=ids,
                    finish=[common_pb2.FinishReason.ValueType(f) for f in finishes[start : start + per_message]],
                )
            )

    def end(self, leg_id: int, outcome: int = worker_pb2.LEG_DONE, detail: str = "", **stats: Any) -> None:
        ended = worker_pb2.LegEnded(
            leg_id=leg_id,
            outcome=worker_pb2.LegOutcome.ValueType(outcome),
            detail=detail,
            stats=stats_to_proto(LegStats(**stats)),
        )
        self.send(ended=ended)
