"""What a controller asks of an instance, over real links: drains with a grace, resuming, retiring, and whom it obeys."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from support.link_client import LinkClient
from support.worker_server import BLOCK_SIZE, LIMITS, RuleEngine, serving

from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.decode_worker.worker import DecodeWorker
from biphase.engine.block_pool import BlockPool
from biphase.engine.link_service import LinkService
from biphase.protos import common_pb2, worker_pb2
from biphase.protos.values import Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIX = Sampling(max_tokens=6, ignore_eos=True)
LONG = Sampling(max_tokens=200, ignore_eos=True)
FREE = "<BlockPool [0 used, 64 free]>"
FLIP = {"role": common_pb2.ROLE_PREFILL, "incarnation": 4}


class NoPuller:
    def __init__(self) -> None:
        self.transports: dict[str, str] = {}

    def counters(self) -> dict[str, int]:
        return {}


@dataclass
class Bench:
    worker: DecodeWorker
    engine: RuleEngine
    address: str
    service: LinkService
    links: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def link(self, **settings: Any) -> LinkClient:
        return await self.links.enter_async_context(LinkClient(self.address, **settings))

    async def controller(self, epoch: int = 1) -> LinkClient:
        return await self.link(kind="controller", epoch=epoch, name=f"controller {epoch}")


@pytest_asyncio.fixture(loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    scheduler = DecodeScheduler(BlockPool(64, BLOCK_SIZE), LIMITS, max_num_seqs=8)
    engine = RuleEngine()
    worker = DecodeWorker(scheduler, engine, NoPuller(), pull_timeout_s=5.0)  # type: ignore[arg-type]
    async with serving(worker, "decode") as (address, service), contextlib.AsyncExitStack() as links:
        yield Bench(worker, engine, address, service, links)
        engine.let_go()
    await worker.close()
    assert repr(scheduler.pool) == FREE and len(worker.legs) == 0


async def refusal(controller: LinkClient, **command: Any) -> str:
    """The one line that a command is refused with."""
    before = len(controller.command_refused)
    await controller.send(**command)
    await controller.until_heard(lambda link: len(link.command_refused) > before)
    refused = controller.command_refused[-1]
    assert refused.command in command and "\n" not in refused.detail
    return refused.detail


async def test_what_outlives_the_grace_ends_as_drained_and_nothing_stays(bench: Bench) -> None:
    link, controller = await bench.link(), await bench.controller()
    bench.engine.hold()
    running = await link.open_decode([5] * 3, LONG)
    await bench.engine.waiting.wait()
    steps = len(bench.engine.plans)
    await controller.send(drain=worker_pb2.Drain(grace_s=0.05))
    await link.until_heard(lambda link: link.load.draining)
    refused = await link.open_decode([5], SIX)
    await refused.until(lambda leg: leg.refused)
    while not bench.worker.scheduler._by_id[0].ending:  # type: ignore[index]  # until its grace is over
        await asyncio.sleep(0.005)
    assert running.ended is None, "its blocks are under a running step"
    bench.engine.let_go()
    assert await running.end() == "drained"
    assert running.detail == "the instance drains, its grace of 0.05 s is over"
    assert len(bench.engine.plans) == steps, "not one step more"
    await controller.until_heard(lambda link: link.load.draining and not link.load.legs)
    assert repr(bench.worker.scheduler.pool) == FREE


async def test_what_ends_within_the_grace_is_done(bench: Bench) -> None:
    link, controller = await bench.link(), await bench.controller()
    drained = asyncio.Event()
    bench.worker.on_drained = drained.set
    bench.engine.hold()
    running = await link.open_decode([5] * 3, SIX)
    await bench.engine.waiting.wait()
    await controller.send(drain=worker_pb2.Drain(grace_s=30.0))
    await link.until_heard(lambda link: link.load.draining and link.load.legs == 1)
    assert not drained.is_set()
    bench.engine.let_go()
    assert await running.end() == "done"
    await asyncio.wait_for(drained.wait(), 5.0)


async def test_a_resumed_instance_takes_work_and_its_grace_is_forgotten(bench: Bench) -> None:
    link, controller = await bench.link(), await bench.controller()
    bench.engine.hold()
    running = await link.open_decode([5] * 3, SIX)
    await bench.engine.waiting.wait()
    await controller.send(drain=worker_pb2.Drain(grace_s=0.5))
    await controller.send(resume=worker_pb2.Resume())
    await refusal(controller, drain=worker_pb2.Drain(grace_s=-1.0))  # commands are done in turn: it has resumed by now
    another = await link.open_decode([5] * 3, SIX)
    await asyncio.sleep(0.7)  # the grace that must not strike
    bench.engine.let_go()
    assert [await leg.end() for leg in (running, another)] == ["done", "done"]


async def test_a_second_drain_sets_the_grace_anew(bench: Bench) -> None:
    link, controller = await bench.link(), await bench.controller()
    bench.engine.hold()
    running = await link.open_decode([5] * 3, LONG)
    await bench.engine.waiting.wait()
    await controller.send(drain=worker_pb2.Drain())
    await controller.send(drain=worker_pb2.Drain(grace_s=0.01))
    while not bench.worker.scheduler._by_id[0].ending:  # type: ignore[index]
        await asyncio.sleep(0.005)
    bench.engine.let_go()
    assert await running.end() == "drained"


@pytest.mark.parametrize("order", ["drain", "resume", "flip", "retire"])
async def test_only_controllers_give_orders(bench: Bench, order: str) -> None:
    link, bystander = await bench.link(), await bench.link()
    await link.send(**{order: getattr(worker_pb2, order.capitalize())()})
    assert f"{order} is for controllers to ask, test is a router" == await link.until_broken()
    assert link.code is not None and link.code.name == "PERMISSION_DENIED"
    assert await (await bystander.open_decode([5], SIX)).end() == "done"


async def test_a_controller_of_a_higher_epoch_ends_the_one_before_and_what_it_says_counts_no_more(bench: Bench) -> None:
    old, router = await bench.controller(epoch=4), await bench.link(epoch=2)
    same = await bench.controller(epoch=4)  # a second opinion
    assert not old.broken
    new = await bench.controller(epoch=5)
    for superseded in (old, same):
        assert await superseded.until_broken() == "membership epoch 4 has given way to epoch 5"
        assert superseded.code is not None and superseded.code.name == "FAILED_PRECONDITION"
    with contextlib.suppress(Exception):  # its stream is over
        await old.send(drain=worker_pb2.Drain())
    late = await bench.controller(epoch=4)
    assert "epoch 4 has given way to epoch 5" in await late.until_broken()
    assert not bench.worker.draining and not new.broken and not router.broken
    await new.send(drain=worker_pb2.Drain())
    await router.until_heard(lambda link: link.load.draining)


async def test_a_command_for_another_life_ends_the_link_and_does_nothing(bench: Bench) -> None:
    controller = await bench.controller()
    await controller.send(incarnation=9, drain=worker_pb2.Drain())
    assert "decode-0 is incarnation 3, the message is meant for incarnation 9" in await controller.until_broken()
    assert not bench.worker.draining


async def test_orders_that_make_no_sense_are_refused_in_one_line(bench: Bench) -> None:
    controller = await bench.controller()
    for grace_s in (-1.0, float("nan"), float("inf")):
        assert f"grace_s is {grace_s}, it must be a number from 0 up" == await refusal(
            controller, drain=worker_pb2.Drain(grace_s=grace_s)
        )
    assert (
        await refusal(
            controller,
            flip=worker_pb2.Flip(role=7, incarnation=4),  # type: ignore[arg-type]
        )
        == "the role is unknown, there are: prefill, decode"
    )
    assert (
        await refusal(controller, flip=worker_pb2.Flip(role=common_pb2.ROLE_DECODE, incarnation=4))
        == "decode-0 is a decode instance already"
    )
    # this process, a test's, serves one role alone
    assert (
        await refusal(controller, flip=worker_pb2.Flip(**FLIP))
        == "decode-0 cannot turn into a prefill instance: its process has no part for that"
    )
    assert not bench.worker.draining


async def test_signals_come_at_once_then_while_anything_runs_and_once_more(bench: Bench) -> None:
    router, controller = await bench.link(), await bench.controller()
    await controller.until_heard(lambda link: link.signals)
    assert (controller.signals[0].num_steps, controller.signals[0].free_blocks) == (0, 64)
    running = await router.open_decode([5] * 30, SIX)
    assert await running.end() == "done"
    bench.engine.hold()
    stuck = await router.open_decode([5] * 30, LONG)
    await bench.engine.waiting.wait()
    await controller.until_heard(lambda link: link.signals[-1].running)
    said = controller.signals[-1]
    assert said.num_steps == 6 and said.prefill_tokens == 30 and said.decode_tokens == 5
    assert said.running == 1 and said.running_tokens == 31 and said.free_blocks == 64 - 8
    assert 0 < said.busy_s <= said.uptime_s and said.recent.num_steps >= 6
    # a step that hangs is told while it runs
    await controller.until_heard(lambda link: link.signals[-1].recent.num_steps == 7)
    assert controller.signals[-1].recent.seconds > 1.0 and controller.signals[-1].num_steps == 6
    assert controller.signals[-1].busy_s >= said.busy_s
    bench.engine.let_go()
    await stuck.cancel()
    assert await stuck.end() == "cancelled"
    await controller.until_heard(lambda link: link.signals[-1].running == 0)
    count = len(controller.signals)
    await asyncio.sleep(1.3)  # an idle instance is silent
    assert len(controller.signals) == count and not router.signals
