"""The decode shell over real links, its engine and its pulls in the test's hand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
import pytest_asyncio
from support.link_client import LinkClient
from support.worker_server import BLOCK_SIZE, LIMITS, RuleEngine, serving

from biphase.decode_worker.requests import StartPull
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.decode_worker.worker import DecodeLeg, DecodeWorker
from biphase.engine.block_pool import BlockPool
from biphase.engine.link import Link, OpenLeg
from biphase.engine.link_service import LinkService
from biphase.kvtransfer.puller import PullResult
from biphase.protos import worker_pb2
from biphase.protos.errors import EngineLost, HandoffFailed
from biphase.protos.ids import BlockId, LegId, RequestId
from biphase.protos.values import KvTicket, LegOutcome, LegStats, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIX = Sampling(max_tokens=6, ignore_eos=True)


class HandPuller:
    """Pulls that end when and how the test says; a cancelled one writes on until ``settled`` is set."""

    def __init__(self) -> None:
        self.transports: dict[str, str] = {}
        self.begun = asyncio.Event()
        self.outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.settled = asyncio.Event()
        self.settled.set()
        self.cancelled = asyncio.Event()

    async def pull(self, ticket: KvTicket, epoch: int, blocks: Sequence[BlockId], *, timeout_s: float) -> PullResult:
        self.begun.set()
        try:
            first_token = await self.outcome
        except asyncio.CancelledError:
            self.cancelled.set()
            await self.settled.wait()
            raise
        return PullResult(bytes=100, ms=2.0, first_token=first_token, exposed_ms=1.0)

    def counters(self) -> dict[str, int]:
        return {}


@dataclass
class Bench:
    worker: DecodeWorker
    engine: RuleEngine
    puller: HandPuller
    address: str
    service: LinkService
    links: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def link(self, *, kind: str = "router") -> LinkClient:
        return await self.links.enter_async_context(LinkClient(self.address, kind=kind))

    @property
    def pool(self) -> str:
        return repr(self.worker.scheduler.pool)


FREE = "<BlockPool [0 used, 64 free]>"
TICKET = worker_pb2.KvTicket(id=b"t" * 16, kv_address="h:1", instance="prefill-0", incarnation=1, num_tokens=8)


@pytest_asyncio.fixture(loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    scheduler = DecodeScheduler(BlockPool(64, BLOCK_SIZE), LIMITS, max_num_seqs=8)
    engine, puller = RuleEngine(), HandPuller()
    worker = DecodeWorker(scheduler, engine, puller, pull_timeout_s=5.0)  # type: ignore[arg-type]
    async with serving(worker, "decode") as (address, service), contextlib.AsyncExitStack() as links:
        yield Bench(worker, engine, puller, address, service, links)
        engine.let_go()
    await worker.close()
    assert repr(scheduler.pool) == FREE and len(worker.legs) == 0


async def test_a_steps_tokens_come_in_one_message_per_link(bench: Bench) -> None:
    one, two = await bench.link(), await bench.link()
    bench.engine.hold()
    legs = [await link.open_decode([5] * 3, SIX) for link in (one, one, one, two)]
    await bench.engine.waiting.wait()
    while len(bench.worker.legs) < 4:
        await asyncio.sleep(0)
    before = one.messages
    bench.engine.let_go()
    assert [await leg.end() for leg in legs] == ["done"] * 4
    assert all(leg.tokens == {n: 100 + n for n in range(6)} for leg in legs)
    said = one.messages - before - one.num_loads
    assert said <= 7 + 3, "7 steps at most (the first leg is one ahead) and 3 ends"


async def test_an_engine_error_ends_the_legs_of_its_step_and_no_others(bench: Bench) -> None:
    link = await bench.link()
    bench.engine.hold()
    struck = await link.open_decode([5] * 3, SIX)
    await bench.engine.waiting.wait()
    spared = await link.open_decode([5] * 3, SIX)
    while len(bench.worker.legs) < 2:
        await asyncio.sleep(0)
    bench.engine.error = RuntimeError("no such kernel\nat line 3")
    bench.engine.let_go()
    assert await struck.end() == "failed"
    assert struck.detail == "the engine failed: no such kernel at line 3"
    assert await spared.end() == "done"
    assert (await link.stats())["failed_steps"] == 1


class HeardLink(Link):
    """Keeps how its legs ended."""

    def __init__(self) -> None:
        super().__init__(1, "test", "router")
        self.ends: list[tuple[LegOutcome, str]] = []

    def ended(self, leg_id: LegId, outcome: LegOutcome, detail: str, stats: LegStats) -> None:
        self.ends.append((outcome, detail))


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_lost_device_ends_the_step_loop_so_that_the_process_ends(depth: int) -> None:
    scheduler = DecodeScheduler(BlockPool(64, BLOCK_SIZE), LIMITS, max_num_seqs=8)
    engine = RuleEngine()
    engine.pipeline_depth = depth
    worker = DecodeWorker(scheduler, engine, HandPuller(), pull_timeout_s=5.0)  # type: ignore[arg-type]
    engine.error = EngineLost("the GPU failed: an illegal memory access")
    leg = OpenLeg(
        role="decode",
        leg_id=LegId(1),
        request_id=RequestId("r1"),
        token_ids=[5] * 3,
        num_prompt_tokens=3,
        sampling=SIX,
        refusals=0,
    )
    worker.open_leg(link := HeardLink(), leg)
    with pytest.raises(EngineLost, match="an illegal memory access"):
        await worker.run()
    # ended by us: to the client the instance is away, "failed" would be an error of its request
    assert link.ends == [("cancelled", "the instance is lost: the GPU failed: an illegal memory access")]
    assert (len(engine.plans), len(worker.legs), scheduler.pool.num_used) == (depth, 0, 0)


async def test_a_cancel_during_a_step_ends_with_it_and_its_token_is_not_said(bench: Bench) -> None:
    link = await bench.link()
    bench.engine.hold()
    leg = await link.open_decode([5] * 3, SIX)
    await bench.engine.waiting.wait()
    await leg.cancel()
    assert (await link.stats())["blocks_used"] == 1 and leg.ended is None
    bench.engine.let_go()
    assert await leg.end() == "cancelled"
    assert len(bench.engine.plans) == 1 and not leg.tokens and bench.pool == FREE


async def test_a_cancelled_pull_keeps_its_blocks_until_it_has_really_ended(bench: Bench) -> None:
    link = await bench.link()
    bench.puller.settled.clear()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    await leg.cancel()
    await bench.puller.cancelled.wait()
    assert bench.pool == "<BlockPool [2 used, 62 free]>" and leg.ended is None
    bench.puller.settled.set()
    assert await leg.end() == "cancelled"
    assert bench.pool == FREE


async def test_a_broken_link_cancels_its_pull(bench: Bench) -> None:
    link = await bench.link()
    await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    await link.break_off()
    await bench.puller.cancelled.wait()
    while bench.worker.legs:
        await asyncio.sleep(0)
    assert bench.pool == FREE


async def test_a_handoff_tells_its_first_token_and_goes_on_after_it(bench: Bench) -> None:
    link = await bench.link()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    bench.puller.outcome.set_result(77)
    assert await leg.end() == "done"
    assert leg.handed_off is not None and leg.handed_off.first_token == 77 and leg.handed_off.bytes == 100
    assert leg.tokens == {n: 100 + n for n in range(1, 6)}


async def test_a_failed_pull_says_why(bench: Bench) -> None:
    link = await bench.link()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    bench.puller.outcome.set_exception(HandoffFailed("cannot reach prefill-0 at h:1"))
    assert await leg.end() == "handoff_failed" and leg.detail == "cannot reach prefill-0 at h:1"


async def test_a_pull_that_breaks_costs_its_leg_alone(bench: Bench) -> None:
    link = await bench.link()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    bench.puller.outcome.set_exception(ZeroDivisionError("oops"))
    assert await leg.end() == "handoff_failed" and leg.detail == "the pull broke: oops"
    assert await (await link.open_decode([5], SIX)).end() == "done"


async def test_when_the_source_is_lost_a_pull_that_is_as_good_as_done_may_finish(bench: Bench) -> None:
    link = await bench.link()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    await leg.cancel(unless_handed_off=True)
    await link.stats()  # the cancel came first
    bench.puller.outcome.set_result(77)
    assert await leg.end() == "done"


async def test_when_the_source_is_lost_a_pull_that_hangs_is_ended(bench: Bench) -> None:
    link = await bench.link()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    await bench.puller.begun.wait()
    await leg.cancel(unless_handed_off=True)
    assert await leg.end() == "handoff_failed" and leg.detail == "prefill instance lost"


class DeafPeer:
    """A stream's context whose peer takes nothing: a write never ends."""

    async def write(self, message: object) -> None:
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise InterruptedError(f"{code.name}: {details}")


async def test_a_peer_that_does_not_read_is_cut_and_the_others_live(bench: Bench) -> None:
    good = await bench.link()

    async def shouts() -> AsyncIterator[worker_pb2.LinkDown]:
        yield worker_pb2.LinkDown(incarnation=3, hello=worker_pb2.Hello(peer_name="deaf"))
        yield worker_pb2.LinkDown(incarnation=3, open_decode=worker_pb2.OpenDecode(leg_id=1, token_ids=b"\1\0\0\0"))
        while True:
            yield worker_pb2.LinkDown(incarnation=3, open_decode=worker_pb2.OpenDecode(leg_id=2, token_ids=b"123"))
            await asyncio.sleep(0)

    with pytest.raises(InterruptedError, match="RESOURCE_EXHAUSTED: deaf has not read 1024 messages"):
        await bench.service.Link(shouts(), DeafPeer())  # type: ignore[arg-type]
    assert await (await good.open_decode([5], SIX)).end() == "done"
    assert (await good.stats())["legs"] == 0


async def test_a_drained_instance_finishes_what_runs_and_takes_nothing_new(bench: Bench) -> None:
    link, controller = await bench.link(), await bench.link(kind="controller")
    drained = asyncio.Event()
    bench.worker.on_drain = drained.set
    bench.engine.hold()
    running = await link.open_decode([5], SIX)
    await bench.engine.waiting.wait()
    await controller.send(drain=worker_pb2.Drain())
    await drained.wait()
    refused = await link.open_decode([5], SIX)
    await refused.until(lambda leg: leg.refused)
    assert refused.refused is not None and refused.refused.reason == worker_pb2.REFUSAL_DRAINING
    bench.engine.let_go()
    assert await running.end() == "done"
    await link.until_heard(lambda link: link.load.draining)


async def test_stopping_ends_every_leg_with_a_word(bench: Bench) -> None:
    link = await bench.link()
    bench.engine.hold()
    in_step = await link.open_decode([5], SIX)
    await bench.engine.waiting.wait()
    pulling = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    while len(bench.worker.legs) < 2:
        await asyncio.sleep(0)
    bench.worker.stop()
    bench.engine.let_go()
    for leg in (in_step, pulling):
        assert await leg.end() == "drained" and leg.detail == "the instance stops", "a move in order, no loss"


async def test_a_pull_cancelled_before_its_first_step_is_reported_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task cancelled that early runs nothing of its coroutine, so nothing in there can report."""
    perform = bench.worker.perform_own

    def cancel_at_once(effect: object, leg: DecodeLeg) -> None:
        perform(effect, leg)
        if isinstance(effect, StartPull):
            bench.worker.cancel_leg(leg.link, leg.leg_id, "gone", unless_handed_off=False)

    monkeypatch.setattr(bench.worker, "perform_own", cancel_at_once)
    link = await bench.link()
    leg = await link.open_decode([5] * 8, SIX, ticket=TICKET)
    assert await leg.end() == "cancelled"
    assert not bench.puller.begun.is_set()
    assert bench.pool == FREE
    assert (await link.stats())["cancelled_pulling"] == 1
