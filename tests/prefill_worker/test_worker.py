"""The prefill shell over real links: what a leg's end waits for, its export table in the test's hand."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from support.link_client import ClientLeg, LinkClient
from support.worker_server import BLOCK_SIZE, LIMITS, RuleEngine, serving

from biphase.engine.block_pool import BlockPool
from biphase.engine.link import Link, OpenLeg
from biphase.engine.step import SeqStep, StepPlan
from biphase.kvtransfer.exports import ExportTable, Readable
from biphase.prefill_worker.scheduler import PrefillScheduler
from biphase.prefill_worker.worker import PrefillWorker
from biphase.protos.errors import EngineLost
from biphase.protos.ids import LegId, RequestId, SeqId, TicketId
from biphase.protos.values import LegOutcome, LegStats, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIX = Sampling(max_tokens=6, ignore_eos=True)
FREE = "<BlockPool [0 used, 64 free]>"


@dataclass
class Bench:
    worker: PrefillWorker
    engine: RuleEngine
    exports: ExportTable
    link: LinkClient

    @property
    def pool(self) -> str:
        return repr(self.worker.scheduler.pool)

    async def started(self, tokens: int, sampling: Sampling = SIX) -> tuple[ClientLeg, TicketId]:
        leg = await self.link.open_prefill([5] * tokens, sampling)
        await leg.until(lambda leg: leg.started)
        assert leg.started is not None
        return leg, TicketId(leg.started.ticket.id)


@pytest_asyncio.fixture(loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    scheduler = PrefillScheduler(BlockPool(64, BLOCK_SIZE), LIMITS, max_num_batched_tokens=16, max_queued_tokens=64)
    exports, engine = ExportTable(scheduler.pool, lease_s=30.0), RuleEngine()
    worker = PrefillWorker(scheduler, engine, exports, name="prefill-0", incarnation=3)
    worker.kv_address = "127.0.0.1:77"

    def report() -> None:
        for ended in exports.take_ended():
            worker.export_ended(ended)

    exports.watch(lambda ticket: asyncio.get_running_loop().call_soon(report) and None)
    async with serving(worker, "prefill") as (address, _):
        async with LinkClient(address) as link:
            yield Bench(worker, engine, exports, link)
            engine.let_go()
    assert repr(scheduler.pool) == FREE and len(worker.legs) == 0 and exports.counters()["tickets"] == 0


async def test_a_leg_lives_until_its_ticket_is_released(bench: Bench) -> None:
    leg, ticket = await bench.started(40)
    await leg.until(lambda leg: leg.tokens)
    assert leg.started is not None
    wire = leg.started.ticket
    assert (wire.kv_address, wire.instance, wire.incarnation, wire.num_tokens, len(ticket)) == (
        *("127.0.0.1:77", "prefill-0", 3, 40),
        16,
    )
    assert leg.tokens == {0: 100} and leg.ended is None
    assert bench.pool == "<BlockPool [10 used, 54 free]>"
    pull = bench.exports.begin_pull(ticket, 1, 0.0)
    assert bench.exports.readable_tokens(pull) == 40
    bench.exports.begin_send(pull)
    bench.exports.end_send(pull, 4000)
    bench.exports.release(ticket, 1, 1.0)
    assert await leg.end() == "done"
    assert leg.ended is not None and leg.ended.stats.transfer_bytes == 4000
    assert bench.pool == FREE


async def test_computed_chunks_may_be_read_while_later_ones_are_computed(bench: Bench) -> None:
    bench.engine.hold()
    leg, ticket = await bench.started(40)
    pull = bench.exports.begin_pull(ticket, 1, 0.0)
    assert bench.exports.readable_tokens(pull) == 0
    bench.engine.let_go()
    bench.engine.hold()
    await bench.engine.waiting.wait()
    assert bench.exports.readable_tokens(pull) in (0, 16)
    bench.engine.let_go()
    await leg.until(lambda leg: leg.tokens)
    assert bench.exports.readable_tokens(pull) == 40
    await leg.cancel()
    assert await leg.end() == "cancelled"


async def test_layers_of_a_running_step_may_be_read(bench: Bench) -> None:
    bench.engine.hold()
    leg, ticket = await bench.started(40)
    pull = bench.exports.begin_pull(ticket, 1, 0.0)
    seq_id = next(iter(bench.worker.legs)).seq_id
    of_nobody = SeqStep(seq_id=SeqId(seq_id + 1), token_ids=[5] * 4, start=0, blocks=[])
    step = StepPlan(seqs=(of_nobody, SeqStep(seq_id=seq_id, token_ids=[5] * 16, start=0, blocks=[])))
    bench.worker.layers_computed(step, 1)
    bench.worker.layers_computed(step, 2)
    assert bench.exports.readable(pull) == Readable(tokens=0, ahead_tokens=16, ahead_layers=2)
    bench.engine.let_go()
    await leg.until(lambda leg: leg.tokens)
    bench.worker.layers_computed(step, 3)  # news of a step that is over
    assert bench.exports.readable(pull) == Readable(tokens=40, ahead_tokens=40, ahead_layers=0)
    await leg.cancel()
    assert await leg.end() == "cancelled"
    bench.worker.layers_computed(step, 3)


async def test_a_cancel_waits_for_the_running_send(bench: Bench) -> None:
    leg, ticket = await bench.started(8)
    await leg.until(lambda leg: leg.tokens)
    pull = bench.exports.begin_pull(ticket, 1, 0.0)
    bench.exports.begin_send(pull)
    await leg.cancel()
    assert (await bench.link.stats())["blocks_used"] == 2 and leg.ended is None
    bench.exports.end_send(pull, 0)
    assert await leg.end() == "cancelled" and bench.pool == FREE


async def test_a_cancel_during_a_step_waits_for_the_step(bench: Bench) -> None:
    bench.engine.hold()
    leg, _ = await bench.started(8)
    await leg.cancel()
    stats = await bench.link.stats()
    assert (stats["tickets"], stats["blocks_used"]) == (0, 2) and leg.ended is None
    bench.engine.let_go()
    assert await leg.end() == "cancelled" and not leg.tokens and bench.pool == FREE


async def test_a_last_first_token_ends_the_leg_at_once(bench: Bench) -> None:
    leg = await bench.link.open_prefill([5] * 8, Sampling(max_tokens=1))
    assert await leg.end() == "done"
    assert leg.started is not None and not leg.started.HasField("ticket") and leg.finishes == [2]
    stopped, _ = await bench.started(8, Sampling(max_tokens=9, stop_token_ids=(100,)))
    assert await stopped.end() == "done" and stopped.finishes == [1]


async def test_an_engine_error_revokes_the_ticket(bench: Bench) -> None:
    bench.engine.error = RuntimeError("no such kernel")
    leg, _ = await bench.started(8)
    assert await leg.end() == "failed" and leg.detail == "the engine failed: no such kernel"
    assert bench.pool == FREE


class HeardLink(Link):
    """Keeps how its legs ended."""

    def __init__(self) -> None:
        super().__init__(1, "test", "router")
        self.ends: list[tuple[LegOutcome, str]] = []

    def ended(self, leg_id: LegId, outcome: LegOutcome, detail: str, stats: LegStats) -> None:
        self.ends.append((outcome, detail))


async def test_a_lost_engine_revokes_the_ticket_and_is_no_fault_of_the_request() -> None:
    scheduler = PrefillScheduler(BlockPool(64, BLOCK_SIZE), LIMITS, max_num_batched_tokens=16, max_queued_tokens=64)
    exports, engine = ExportTable(scheduler.pool, lease_s=30.0), RuleEngine()
    worker = PrefillWorker(scheduler, engine, exports, name="prefill-0", incarnation=3)
    engine.error = EngineLost("rank 2 has been silent for 1.5 s")
    leg = OpenLeg(
        role="prefill",
        leg_id=LegId(1),
        request_id=RequestId("r1"),
        token_ids=[5] * 8,
        num_prompt_tokens=8,
        sampling=SIX,
        refusals=0,
    )
    worker.open_leg(link := HeardLink(), leg)
    with pytest.raises(EngineLost, match="rank 2 has been silent"):
        await worker.run()
    for ended in exports.take_ended():
        worker.export_ended(ended)
    assert link.ends == [("cancelled", "the instance is lost: rank 2 has been silent for 1.5 s")]
    assert repr(scheduler.pool) == FREE and exports.counters()["tickets"] == 0


async def test_a_lease_that_runs_out_ends_the_leg_so(bench: Bench) -> None:
    leg, ticket = await bench.started(8)
    await leg.until(lambda leg: leg.tokens)
    bench.exports.leg_closed(ticket, 0.0)
    assert bench.exports.expire(1e9) == [ticket]
    assert await leg.end() == "lease_expired"
