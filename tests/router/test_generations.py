"""Two generations of the weights at once: a request ends on the one it began on, or ABORTED."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from support.scripted_controller import ScriptedController
from support.scripted_worker import ScriptedWorker

from biphase.protos import worker_pb2
from biphase.router.config import RouterConfig, Waits

LENGTH = 2
WAITS = Waits(no_prefill_s=0.2, no_decode_s=5.0, no_generation_s=0.3, leg_end_s=0.3, drain_s=0.3)
NAMES = ("old-p", "old-d", "new-p", "new-d")
GENERATIONS = {name: name[:3] for name in (*NAMES, "old-d2")}


class Stage:
    """An old and a new instance of each role; the new ones have other weights, and join when the test says so."""

    def __init__(self, door: Any, controller: ScriptedController, workers: list[ScriptedWorker]) -> None:
        self.door = door
        self.controller = controller
        self.old_p, self.old_d, self.new_p, self.new_d = workers
        self.version = 0

    def members(self, *workers: ScriptedWorker, draining: tuple[str, ...] = ()) -> None:
        self.version += 1
        self.controller.say(1, self.version, *workers, draining=draining, generations=GENERATIONS)

    async def begin(self, max_tokens: int = 4) -> tuple[Any, int]:
        """A request that decodes on the old instance, one token out; its decode leg."""
        answer = self.door.ask(max_tokens=max_tokens)
        prefill = (await self.old_p.next("open_prefill")).leg_id
        self.old_p.start(prefill)
        decode = (await self.old_d.next("open_decode")).leg_id
        self.old_p.tokens(prefill, 0, b"A")
        self.old_d.hand_off(decode)
        async with self.door.a_leg_ends():
            self.old_p.end(prefill)
        await answer.text_is("A")
        return answer, decode


@pytest.fixture
async def stage(
    controller: ScriptedController, toy_tokenizer: Any, running_router: Callable[..., Any]
) -> AsyncIterator[Stage]:
    async with contextlib.AsyncExitStack() as exits:
        workers = [
            await exits.enter_async_context(
                ScriptedWorker(
                    "prefill" if name.endswith("p") else "decode", name=name, model_hash=GENERATIONS[name].encode()
                )
            )
            for name in NAMES
        ]
        config = RouterConfig(model="toy", controller=f"127.0.0.1:{controller.port}", waits=WAITS, mode="strict")
        door = await exits.enter_async_context(running_router(config))
        made = Stage(door, controller, workers)
        made.members(made.old_p, made.old_d)
        await door.until_states("ready", "ready")
        yield made


async def test_both_are_linked_and_a_ticket_stays_within_its_generation(stage: Stage) -> None:
    s = stage
    answer = s.door.ask(max_tokens=4)
    prefill = (await s.old_p.next("open_prefill")).leg_id
    s.members(s.old_p, s.old_d, s.new_p, s.new_d)
    await s.door.until_states("ready", "ready", "ready", "ready")
    s.old_d.load(running=5)
    s.old_p.start(prefill)
    decode = (await s.old_d.next("open_decode")).leg_id
    s.old_d.refuse(decode)  # busy: the new one has room, but it is not its own
    await s.door.until_counters(queued_requests=1)
    s.old_d.load()
    await s.old_d.next("open_decode")
    assert s.new_d.commands.empty()
    assert answer.error is None


async def test_a_request_goes_on_on_another_instance_of_its_generation(stage: Stage) -> None:
    s = stage
    answer, _ = await s.begin(max_tokens=3)
    async with ScriptedWorker("decode", name="old-d2", model_hash=b"old") as second:
        s.members(s.old_p, s.old_d, second, s.new_p, s.new_d)
        await s.door.until_states("ready", "ready", "ready", "ready", "ready")
        await s.old_d.die()
        again = (await s.old_p.next("open_prefill")).leg_id
        s.old_p.start(again)
        decode = (await second.next("open_decode")).leg_id
        s.old_p.tokens(again, 1, b"B")
        second.hand_off(decode)
        s.old_p.end(again)
        second.tokens(decode, 2, b"C", LENGTH)
        second.end(decode)
        await answer.finished()
        assert answer.text == "ABC"


async def test_what_waits_for_its_generation_does_not_keep_others_from_the_new_one(stage: Stage) -> None:
    s = stage
    _, decode = await s.begin()
    s.members(s.old_p, s.old_d, s.new_p, s.new_d)
    await s.door.until_states("ready", "ready", "ready", "ready")
    s.old_d.load(running=1, room_blocks=0)
    await s.door.until(lambda info: any(one.running == 1 for one in info.instances))
    s.old_d.end(decode, worker_pb2.LEG_DRAINED, "it has to go on elsewhere")
    await s.door.until_counters(replays_drained=1, queued_requests=1)
    fresh = s.door.ask("other", max_tokens=1)
    leg = (await s.new_p.next("open_prefill")).leg_id
    s.new_p.start(leg, ticket=False)
    s.new_p.tokens(leg, 0, b"B", LENGTH)
    s.new_p.end(leg)
    await fresh.finished()
    assert s.old_p.commands.empty()
    s.old_d.load()
    await s.old_p.next("open_prefill")


async def test_where_its_generation_is_gone_it_ends_aborted(stage: Stage) -> None:
    s = stage
    answer, decode = await s.begin()
    s.members(s.old_p, s.old_d, s.new_p, s.new_d, draining=("old-p", "old-d"))
    await s.door.until_states("draining", "draining", "ready", "ready")
    fresh = s.door.ask(max_tokens=2)
    assert (await s.new_p.next("open_prefill")).num_prompt_tokens == 6  # what has not begun takes the new ones
    s.old_d.end(decode, worker_pb2.LEG_DRAINED, "its grace is over")
    code, detail = await answer.failed()
    assert code == grpc.StatusCode.ABORTED
    assert "it began on generation 'old', of which no decode instance is left" in detail
    assert fresh.error is None


async def test_before_its_first_token_a_request_may_begin_anew(stage: Stage) -> None:
    s = stage
    answer = s.door.ask(max_tokens=1)
    await s.old_p.next("open_prefill")
    s.members(s.new_p, s.new_d)
    await s.old_p.die()
    leg = (await s.new_p.next("open_prefill")).leg_id
    s.new_p.start(leg, ticket=False)
    s.new_p.tokens(leg, 0, b"A", LENGTH)
    s.new_p.end(leg)
    assert (await answer.finished()).replays == 1
