"""A router over real loopback gRPC, in the test's own loop, with scripted instances and a toy tokenizer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from support.scripted_controller import ScriptedController
from support.scripted_worker import WITHIN_S, ScriptedWorker

from biphase.protos import router_pb2, router_pb2_grpc
from biphase.protos.grpc_setup import channel_options
from biphase.protos.process import Announcement, Announcer
from biphase.router import serve as serve_module
from biphase.router.config import RequestLimits, RouterConfig, Waits


class ToyDetokenizer:
    """One character per token."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def flush(self) -> str:
        return ""


@dataclass
class ToyTokenizer:
    """One token per character, ids up to 255."""

    vocab_size: int = 256
    max_context: int = 200
    longest_token: int = 50
    eos_token_ids: tuple[int, ...] = (0,)
    has_chat_template: bool = True
    name: str = "toy-file"
    generation_defaults: dict[str, float] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        return self.encode("".join(f"<{role}>{content}" for role, content in messages))

    def detokenizer(self) -> ToyDetokenizer:
        return ToyDetokenizer()


class Answer:
    """A Generate call read to its end in a task of its own; ``got`` and ``until`` look at what came so far."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.replies: list[router_pb2.GenerateReply] = []
        self.error: grpc.aio.AioRpcError | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for reply in self.call:
                self.replies.append(reply)
                self._changed.set()
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            pass
        self._changed.set()

    async def until(self, condition: Callable[["Answer"], bool]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def accepted(self) -> router_pb2.Accepted:
        await self.until(lambda answer: bool(answer.replies) or answer.error is not None)
        assert self.error is None, self.error
        return self.replies[0].accepted

    async def text_is(self, text: str) -> None:
        await self.until(lambda answer: answer.text == text or answer.error is not None)
        assert self.text == text, self.error

    async def finished(self) -> router_pb2.Finished:
        async with asyncio.timeout(WITHIN_S):
            await self._task
        assert self.error is None, self.error
        return self.replies[-1].finished

    async def failed(self) -> tuple[grpc.StatusCode, str]:
        async with asyncio.timeout(WITHIN_S):
            await self._task
        assert self.error is not None, self.replies
        return self.error.code(), self.error.details() or ""

    @property
    def deltas(self) -> list[router_pb2.Delta]:
        return [reply.delta for reply in self.replies if reply.WhichOneof("event") == "delta"]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        """All tokens; each index has come once and in order."""
        tokens: list[int] = []
        for delta in self.deltas:
            assert delta.first_index == len(tokens)
            tokens.extend(delta.token_ids)
        return tokens


class Door:
    """A running router and a client of it."""

    def __init__(self, address: str, channel: grpc.aio.Channel, stop: asyncio.Event) -> None:
        self.address = address
        self.stop = stop
        self.stub = router_pb2_grpc.RouterStub(channel)

    def ask(self, text: str = "prompt", *, timeout: float | None = None, **request: Any) -> Answer:
        sampling = {
            name: request.pop(name)
            for name in list(request)
            if name in router_pb2.SamplingParams.DESCRIPTOR.fields_by_name
        }
        if not {"token_ids", "chat"} & request.keys():
            request["text"] = text
        message = router_pb2.GenerateRequest(sampling=router_pb2.SamplingParams(**sampling), **request)
        return Answer(self.stub.Generate(message, timeout=timeout))

    async def info(self) -> router_pb2.ServerInfoReply:
        return await self.stub.GetServerInfo(router_pb2.GetServerInfoRequest())

    async def counters(self) -> dict[str, int]:
        return dict((await self.info()).counters)

    async def until(self, condition: Callable[[router_pb2.ServerInfoReply], bool]) -> router_pb2.ServerInfoReply:
        """Ask GetServerInfo until it shows what the test waits for; the router announces nothing by itself."""
        async with asyncio.timeout(WITHIN_S):
            while not condition(info := await self.info()):
                await asyncio.sleep(0.005)
        return info

    async def until_states(self, *states: str) -> None:
        """Until the instances, in order of address as given, are in these states."""
        await self.until(lambda info: [instance.state for instance in info.instances] == list(states))

    async def until_running(self, running: int) -> None:
        """Until the last instance's Load has come."""
        await self.until(lambda info: info.instances[-1].running == running)

    async def until_queued_tokens(self, tokens: int) -> None:
        """Until the first instance's Load has come."""
        await self.until(lambda info: info.instances[0].queued_tokens == tokens)

    async def until_counters(self, **wanted: int) -> dict[str, int]:
        info = await self.until(lambda info: all(info.counters[name] == value for name, value in wanted.items()))
        return dict(info.counters)

    @contextlib.asynccontextmanager
    async def a_leg_ends(self) -> AsyncIterator[None]:
        """Inside, an instance says so; until the router has seen it."""
        legs = (await self.counters())["legs"]
        yield
        await self.until_counters(legs=legs - 1)

    async def until_idle(self) -> dict[str, int]:
        return await self.until_counters(live_requests=0, queued_requests=0, queued_tokens=0, legs=0)


@contextlib.asynccontextmanager
async def running_router(config: RouterConfig) -> AsyncIterator[Door]:
    ready = asyncio.Event()
    seen: list[Announcement] = []

    def publish(announcement: Announcement) -> None:
        seen.append(announcement)
        if announcement.state == "ready":
            ready.set()

    announcer = Announcer(Announcement(name=config.name, kind="router", incarnation=1, pid=1), publish)
    stop = asyncio.Event()
    serving = asyncio.create_task(serve_module.serve(config, announcer, stop))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if serving.done():
        serving.result()
    try:
        async with grpc.aio.insecure_channel(announcer.current.address, options=channel_options()) as channel:
            yield Door(announcer.current.address, channel, stop)
    finally:
        stop.set()
        async with asyncio.timeout(WITHIN_S):
            await serving
        assert announcer.current.state == "stopped"


@pytest.fixture(name="running_router")
def running_router_fixture() -> Callable[[RouterConfig], contextlib.AbstractAsyncContextManager[Door]]:
    return running_router


@pytest.fixture
def toy_tokenizer(monkeypatch: pytest.MonkeyPatch) -> ToyTokenizer:
    tokenizer = ToyTokenizer()

    class Loader:
        @staticmethod
        def load(model: str) -> ToyTokenizer:
            return tokenizer

    monkeypatch.setattr(serve_module, "Tokenizer", Loader)
    return tokenizer


@dataclass
class Stage:
    """One router, its prefill and its decode instances."""

    door: Door
    prefill: list[ScriptedWorker]
    decode: list[ScriptedWorker]

    @property
    def p(self) -> ScriptedWorker:
        return self.prefill[0]

    @property
    def d(self) -> ScriptedWorker:
        return self.decode[0]

    async def hand_over(self, answer: Answer) -> tuple[int, int]:
        """Prefill done, its token "A" told, handed off; returns both leg ids.

        Until the router has seen the end of the prefill leg: it comes over another link than what the test has the
        decode instance do next, which could overtake it.
        """
        await answer.accepted()
        prefill = (await self.p.next("open_prefill")).leg_id
        self.p.start(prefill)
        decode = (await self.d.next("open_decode")).leg_id
        self.p.tokens(prefill, 0, b"A")
        self.d.hand_off(decode)
        async with self.door.a_leg_ends():
            self.p.end(prefill)
        return prefill, decode


SHORT_WAITS = Waits(no_prefill_s=0.2, no_decode_s=0.2, leg_end_s=0.3, drain_s=0.3, busy_retry_s=0.2)


@pytest.fixture
def stage(toy_tokenizer: ToyTokenizer) -> Callable[..., contextlib.AbstractAsyncContextManager[Stage]]:
    """``async with stage(prefill=1, decode=2, mode="strict") as s:``; all links are ready inside."""

    @contextlib.asynccontextmanager
    async def make(
        *,
        prefill: int = 1,
        decode: int = 1,
        prefill_values: dict[str, Any] | None = None,
        decode_values: dict[str, Any] | None = None,
        limits: RequestLimits | None = None,
        waits: Waits = SHORT_WAITS,
        **config: Any,
    ) -> AsyncIterator[Stage]:
        async with contextlib.AsyncExitStack() as exits:
            ps = [ScriptedWorker("prefill", name=f"prefill-{n}", **(prefill_values or {})) for n in range(prefill)]
            ds = [ScriptedWorker("decode", name=f"decode-{n}", **(decode_values or {})) for n in range(decode)]
            for worker in (*ps, *ds):
                await exits.enter_async_context(worker)
            for group in (ps, ds):  # among equals the policy takes the first by address
                group.sort(key=lambda worker: worker.address)
            router_config = RouterConfig(
                model="toy",
                prefill=tuple(worker.address for worker in ps),
                decode=tuple(worker.address for worker in ds),
                limits=limits or RequestLimits(),
                waits=waits,
                **config,
            )
            door = await exits.enter_async_context(running_router(router_config))
            await door.until_states(*["ready"] * (prefill + decode))
            yield Stage(door, ps, ds)

    return make


@pytest.fixture
async def controller() -> AsyncIterator[ScriptedController]:
    one = ScriptedController()
    await one.listen()
    yield one
    await one.die()
