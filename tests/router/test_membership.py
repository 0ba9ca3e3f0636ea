"""Who the instances are: the controller's stream, over a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.scripted_controller import ScriptedController
from support.scripted_worker import ScriptedWorker

from biphase.protos import common_pb2, controller_pb2
from biphase.router.config import RouterConfig, Waits
from biphase.router.membership import MembershipWatch

LENGTH = 2
WAITS = Waits(no_prefill_s=0.2, no_decode_s=5.0, leg_end_s=0.3, drain_s=0.3)


@contextlib.asynccontextmanager
async def workers(*roles: str) -> AsyncIterator[list[ScriptedWorker]]:
    async with contextlib.AsyncExitStack() as exits:
        made = [ScriptedWorker(role, name=f"{role}-{n}") for n, role in enumerate(roles)]  # type: ignore[arg-type]
        yield [await exits.enter_async_context(worker) for worker in made]


def config(controller: ScriptedController, **values: Any) -> RouterConfig:
    return RouterConfig(model="toy", controller=f"127.0.0.1:{controller.port}", waits=WAITS, **values)


async def test_instances_come_from_the_controller_and_stay_when_it_dies(controller, toy_tokenizer, running_router):
    async with workers("prefill", "decode") as (p, d):
        async with running_router(config(controller)) as door:
            answer = door.ask(max_tokens=1, timeout=20)  # asked before any instance is known
            await answer.accepted()
            controller.say(1, 1, p, d)
            leg = (await p.next("open_prefill")).leg_id
            assert p.hellos[0].incarnation == 7
            assert p.hellos[0].hello.membership_epoch == 1
            await controller.die()
            p.start(leg, ticket=False)
            p.tokens(leg, 0, b"A", LENGTH)
            p.end(leg)
            await answer.finished()
            again = door.ask(max_tokens=1)
            await p.next("open_prefill")
            await again.accepted()
            await controller.listen()  # another life of it, with a higher epoch and one instance less
            controller.say(2, 1, d)
            await door.until_states("draining", "ready")
            assert again.error is None  # its leg may end


async def test_a_new_incarnation_replaces_the_old_one_at_once(controller, toy_tokenizer, running_router, caplog):
    async with workers("prefill", "decode") as (p, d):
        async with running_router(config(controller)) as door:
            controller.say(1, 1, p, d)
            await door.until_states("ready", "ready")
            door.ask()
            await d.wait_linked()
            await p.next("open_prefill")
            async with ScriptedWorker("prefill", name="prefill-0", incarnation=8) as reborn:
                controller.say(1, 2, reborn, d)
                await reborn.next("open_prefill")  # the same request
                assert "replaced by incarnation 8" in caplog.text
                door.ask()
                await reborn.next("open_prefill")


async def test_a_router_reports_its_load_about_once_a_second(controller, toy_tokenizer, running_router):
    async with workers("prefill", "decode") as (p, d):
        async with running_router(config(controller, max_replays=0)) as door:
            controller.say(3, 1, p, d)
            await door.until_states("ready", "ready")
            first = await controller.until_reported(lambda report: report.membership_epoch == 3)
            assert (first.name, first.incarnation, first.offered_requests) == ("router-0", 1, 0)
            answers = [door.ask("prompt", max_tokens=1), door.ask("longer prompt", max_tokens=4)]
            legs = [(await p.next("open_prefill")).leg_id for _ in answers]
            p.start(legs[0], ticket=False)
            p.tokens(legs[0], 0, b"A", LENGTH)
            p.end(legs[0])
            await answers[0].finished()
            report = await controller.until_reported(lambda report: report.ended["finished"])
            assert (report.offered_requests, report.offered_prompt_tokens, report.offered_output_tokens) == (2, 19, 1)
            assert (sum(report.latency.counts), report.latency.missed, sum(report.running.counts)) == (1, 0, 0)
            assert report.running_requests == 1  # which waits for its first token, and has no pace yet
            await p.die()
            await answers[1].failed()
            report = await controller.until_reported(lambda report: report.ended["failed"])
            assert (sum(report.latency.counts), report.latency.missed, sum(report.running.counts)) == (1, 1, 0)
            assert sum(report.prompt_tokens.counts) == 2 and sum(report.output_tokens.counts) == 1
            await door.ask("", max_tokens=1).failed()
            report = await controller.until_reported(lambda report: controller.reports.empty())
            assert report.offered_requests == 2  # a mistake of the user's is no load
            door.ask("prompt", max_tokens=4)
            leg = (await d.next("open_decode")).leg_id
            d.tokens(leg, 0, b"AB")
            report = await controller.until_reported(lambda report: sum(report.running.counts))
            assert (sum(report.latency.counts), sum(report.running.counts)) == (1, 1)


async def test_an_older_controller_is_not_obeyed(controller, toy_tokenizer, running_router):
    async with workers("decode", "decode") as (old, new):
        async with running_router(config(controller)) as door:
            controller.say(5, 1, new)
            await door.until_states("ready")
            controller.say(4, 9, old)  # one that thinks it lives yet
            controller.say(5, 2, new, draining=("decode-1",))
            await door.until_states("draining")
            assert old.hellos == []


async def test_a_member_that_is_no_longer_named_ends_its_legs_first(controller, toy_tokenizer, running_router):
    async with workers("decode", "decode") as (old, new):
        async with running_router(config(controller)) as door:
            controller.say(1, 1, old)
            answer = door.ask(max_tokens=2)
            leg = (await old.next("open_decode")).leg_id
            old.tokens(leg, 0, b"A")
            await answer.text_is("A")
            controller.say(1, 2, new)
            await new.wait_linked()
            door.ask(max_tokens=2)
            await new.next("open_decode")
            assert [one.state for one in (await door.info()).instances] == ["draining", "ready"]
            old.tokens(leg, 1, b"B", LENGTH)
            old.end(leg)
            await answer.finished()
            async with asyncio.timeout(10):
                await old.unlinked.wait()
            await door.until_states("ready")


async def test_a_draining_member_gets_nothing_new(controller, toy_tokenizer, running_router):
    async with workers("decode", "decode") as (first, second):
        async with running_router(config(controller)) as door:
            controller.say(1, 1, first, second)
            await door.until_states("ready", "ready")
            controller.say(1, 2, first, second, draining=("decode-0",))
            await door.until_states("draining", "ready")
            door.ask()
            await second.next("open_decode")


async def test_an_instance_of_another_life_or_role_or_model_is_not_used(controller, toy_tokenizer, running_router):
    async with workers("decode") as (d,):
        async with ScriptedWorker("decode", name="other", model_hash=b"other") as other:
            async with running_router(config(controller)) as door:
                controller.say(1, 1, d)
                await door.until_states("ready")
                controller.say(1, 2, d, other)
                await door.until_states("ready", "lost")
                d.incarnation = 9  # the process is another one now, the controller has not said so
                d.hang_up()
                await door.until_states("lost", "ready")  # with the first away the other model may be served


def test_only_the_highest_epoch_is_obeyed() -> None:
    applied: list[tuple[int, list[str]]] = []

    def apply(members: Any, epoch: int) -> None:
        applied.append((epoch, [member.key for member in members]))

    watch = MembershipWatch("127.0.0.1:1", controller_pb2.RouterReport, apply)

    def say(epoch: int, version: int, *names: str) -> None:
        members = [controller_pb2.Member(name=name, role=common_pb2.ROLE_DECODE, address="a") for name in names]
        watch.take(controller_pb2.Membership(epoch=epoch, version=version, members=members))

    say(5, 1, "a")
    say(4, 9, "old controller")
    say(5, 1, "again")
    say(5, 2, "a", "b")
    say(6, 1, "c")
    say(5, 3, "late")
    assert applied == [(5, ["a"]), (5, ["a", "b"]), (6, ["c"])]


def test_an_unknown_role_is_an_error() -> None:
    watch = MembershipWatch("127.0.0.1:1", controller_pb2.RouterReport, lambda members, epoch: None)
    with pytest.raises(KeyError):
        watch.take(controller_pb2.Membership(epoch=1, version=1, members=[controller_pb2.Member(name="x")]))
