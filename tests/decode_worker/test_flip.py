"""Instances as real processes that turn into the other role and back: their tokens, their books, and what is refused."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.deployment import Deployment, Running
from support.link_client import LinkClient, hand_over
from support.tiny_models import VOCAB, tiny_config, tiny_weights, write_directory

from biphase.protos import common_pb2, worker_pb2
from biphase.protos.values import Role, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BLOCKS = 24
LONG = Sampling(max_tokens=400, ignore_eos=True)
ENDLESS = Sampling(max_tokens=16_000, ignore_eos=True)
"""For an instance of ``long_model``: no machine is through with it before a signal has come."""
TURNS_WITHIN_S = 20.0
BOOKS = ("legs", "sequences", "queued", "running", "blocks_used", "queued_tokens")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"), tiny_config(), tiny_weights())


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("long"), tiny_config(max_position_embeddings=16_384), tiny_weights())


def flags(model: Path, blocks: int = BLOCKS, max_model_len: int = 512) -> list[str]:
    sizes = ["--num-kv-blocks", str(blocks), "--max-model-len", str(max_model_len), "--max-num-batched-tokens", "32"]
    return ["--model", str(model), "--device", "cpu", "--threads", "1", "--weights-cache", str(model / "cache"), *sizes]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[list[Running]]:
    """A prefill and a decode instance; tests may leave either in either role."""
    deployment = Deployment(tmp_path_factory.mktemp("flip"))
    try:
        for role in ("prefill", "decode"):
            command = [sys.executable, "-m", f"biphase.{role}_worker", *flags(model), "--incarnation", "10"]
            deployment.decode.append(deployment.spawn(role, command, instance=f"{role}-0"))
        for running in deployment.decode:
            running.wait_ready()
        yield deployment.decode
    finally:
        deployment.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def controllers(pair: list[Running]) -> AsyncIterator[None]:
    """Afterwards each is again what it was."""
    yield
    for running, role in zip(pair, ROLES, strict=True):
        if running.announcement().kind != role:  # type: ignore[union-attr]
            await turned(running, role)


ROLES: tuple[Role, Role] = ("prefill", "decode")
TO_PROTO = {"prefill": common_pb2.ROLE_PREFILL, "decode": common_pb2.ROLE_DECODE}


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 7919 + position * 31) % (VOCAB - 3) for position in range(tokens)]


async def welcomed(running: Running, incarnation: int) -> None:
    """Wait until the instance welcomes links to that life."""
    async with asyncio.timeout(TURNS_WITHIN_S):
        while True:
            async with LinkClient(running.address, incarnation=incarnation, name="waiting") as link:
                if link.welcome.name:
                    return
            await asyncio.sleep(0.01)


async def turned(running: Running, role: Role, *, grace_s: float = 5.0) -> int:
    """Have it turn into ``role``; returns its new incarnation."""
    async with LinkClient(running.address, kind="controller", epoch=1) as controller:
        incarnation = controller.incarnation + 1
        await controller.send(flip=worker_pb2.Flip(role=TO_PROTO[role], incarnation=incarnation, grace_s=grace_s))
        assert f"turns into a {role} instance" in await controller.until_broken()
        assert controller.code is not None and controller.code.name == "UNAVAILABLE"
    await welcomed(running, incarnation)
    found = running.announcement()
    assert found is not None and (found.kind, found.incarnation, found.state) == (role, incarnation, "ready")
    return incarnation


async def clean(link: LinkClient) -> None:
    async with asyncio.timeout(5.0):
        while True:
            stats = await link.stats()
            if not any(stats.get(name) for name in (*BOOKS, "tickets", "open_pulls", "running_sends")):
                return


async def test_both_turn_and_turn_back_and_give_the_same_tokens(pair: list[Running], controllers: None) -> None:
    prompts = [prompt(tokens, tokens) for tokens in (1, 32, 33, 100)]

    async def disaggregated(prefill: Running, decode: Running) -> list[list[int]]:
        found = []
        async with LinkClient(prefill.address) as first, LinkClient(decode.address) as second:
            for token_ids in prompts:
                prefilled, decoded = await hand_over(first, second, token_ids)
                assert decoded is not None and decoded.handed_off is not None
                found.append(prefilled.text + decoded.text)
            await clean(first)
            await clean(second)
        return found

    before = await disaggregated(*pair)
    for _ in range(2):
        await turned(pair[0], "decode")
        async with LinkClient(pair[0].address) as link:  # the old prefill instance, alone
            alone = [await link.open_decode(token_ids) for token_ids in prompts]
            assert [await leg.end() for leg in alone] == ["done"] * len(prompts)
            assert [leg.text for leg in alone] == before
        await turned(pair[1], "prefill")
        assert await disaggregated(pair[1], pair[0]) == before
        await turned(pair[1], "decode")
        await turned(pair[0], "prefill")
        assert await disaggregated(*pair) == before


async def test_a_flip_under_load_ends_what_is_left_as_drained_and_nothing_stays(
    pair: list[Running], controllers: None
) -> None:
    prefill, decode = pair
    async with LinkClient(prefill.address) as first, LinkClient(decode.address) as second:
        parked = await first.open_prefill(prompt(70), LONG)  # computed, never pulled
        await parked.until(lambda leg: leg.tokens)
        running = [await second.open_decode(prompt(20, seed), LONG) for seed in range(4)]
        for leg in running:
            await leg.until(lambda leg: leg.tokens)
        await asyncio.gather(turned(prefill, "decode", grace_s=0.02), turned(decode, "prefill", grace_s=0.02))
        for leg in (parked, *running):
            assert await leg.end() == "drained", leg.ended
            assert leg.detail == "the instance drains, its grace of 0.02 s is over"
        assert all(0 < len(leg.tokens) < 400 for leg in running)
        for link, role in ((first, "decode"), (second, "prefill")):
            assert f"turns into a {role} instance" in await link.until_broken()
            assert link.code is not None and link.code.name == "UNAVAILABLE"
    async with LinkClient(decode.address) as first, LinkClient(prefill.address) as second:
        for link in (first, second):
            stats = await link.stats()
            assert stats["blocks_free"] == BLOCKS and stats["steps"] == 0 and 0 < stats["turned_ms"] < 1000
        # whoever lost its instance goes on where it stood, elsewhere
        whole = await second.open_decode(prompt(20, 1), Sampling(max_tokens=40, ignore_eos=True))
        assert await whole.end() == "done"
        emitted = running[1].text[:30]
        assert whole.text[: len(emitted)] == emitted
        prefilled, decoded = await hand_over(
            first, second, [*prompt(20, 1), *emitted], Sampling(max_tokens=40, ignore_eos=True), forced=len(emitted)
        )
        assert decoded is not None and prefilled.text + decoded.text == whole.text[len(emitted) :]
        for link in (first, second):
            await clean(link)


async def test_what_ends_within_the_grace_is_done_and_keeps_the_turn_waiting_no_longer(
    pair: list[Running], controllers: None
) -> None:
    async with LinkClient(pair[1].address) as link:
        running = await link.open_decode(prompt(20), Sampling(max_tokens=60, ignore_eos=True))
        await running.until(lambda leg: leg.tokens)
        await asyncio.wait_for(turned(pair[1], "prefill", grace_s=600.0), 30.0)
        assert await running.end() == "done" and len(running.tokens) == 60


async def test_the_life_before_is_spoken_to_no_more(pair: list[Running], controllers: None) -> None:
    async with LinkClient(pair[0].address) as link:
        before = link.incarnation
        ticket_of_before = await link.open_prefill(prompt(40), LONG)
        await ticket_of_before.until(lambda leg: leg.started)
        assert ticket_of_before.started is not None
        ticket = ticket_of_before.started.ticket
        await turned(pair[0], "decode", grace_s=0.01)
        assert await ticket_of_before.end() == "drained"
    async with LinkClient(pair[0].address, incarnation=before) as link:
        told = f"prefill-0 is incarnation {before + 1}, the message is meant for incarnation {before}"
        assert await link.until_broken() == told
        assert link.code is not None and link.code.name == "FAILED_PRECONDITION"
    async with LinkClient(pair[1].address) as link:
        late = await link.open_decode(prompt(40), LONG, ticket=ticket)
        assert await late.end() == "handoff_failed"
    await turned(pair[0], "prefill")
    async with LinkClient(pair[1].address) as link:
        again = await link.open_decode(prompt(40), LONG, ticket=ticket)
        assert await again.end() == "handoff_failed"
        assert "prefill-0" in again.detail
        await clean(link)


async def test_flips_that_make_no_sense_are_refused_and_change_nothing(pair: list[Running]) -> None:
    async with LinkClient(pair[0].address, kind="controller", epoch=1) as controller:

        async def refusal(**flip: int) -> str:
            await controller.send(flip=worker_pb2.Flip(**flip))
            await controller.until_heard(lambda link: link.command_refused)
            return controller.command_refused.pop().detail

        now = controller.incarnation
        assert await refusal(role=9, incarnation=now + 1) == "the role is unknown, there are: prefill, decode"
        assert await refusal(role=TO_PROTO["prefill"], incarnation=now + 1) == "prefill-0 is a prefill instance already"
        told = await refusal(role=TO_PROTO["decode"], incarnation=now)
        assert told == f"incarnation {now} is not above {now}, which prefill-0 lives"
        await controller.send(drain=worker_pb2.Drain(grace_s=5.0))
        told = await refusal(role=TO_PROTO["decode"], incarnation=now + 1)
        assert told == "prefill-0 is draining already: it is resumed first, or it ends"
        await controller.send(resume=worker_pb2.Resume())
        await refusal(role=9, incarnation=now + 1)  # commands are done in turn: it has resumed by now
    async with LinkClient(pair[0].address) as link:
        assert link.incarnation == now
        leg = await link.open_prefill(prompt(20), Sampling(max_tokens=1))
        assert await leg.end() == "done"


async def test_sigterm_drains_and_a_second_one_ends_at_once(tmp_path: Path, long_model: Path) -> None:
    deployment = Deployment(tmp_path)
    try:
        for name in ("patient", "hasty", "short"):
            command = [sys.executable, "-m", "biphase.decode_worker", *flags(long_model, 520, 16_384)]
            command += ["--drain-s", "0.05" if name == "short" else "60"]
            deployment.decode.append(deployment.spawn(name, command))
        for running in deployment.decode:
            await asyncio.to_thread(running.wait_ready)
        patient, hasty, short = deployment.decode
        async with (
            LinkClient(patient.address) as one,
            LinkClient(hasty.address) as two,
            LinkClient(short.address) as three,
        ):
            done = await one.open_decode(prompt(20), Sampling(max_tokens=100, ignore_eos=True))
            cut = await two.open_decode(prompt(20), ENDLESS)
            drained = await three.open_decode(prompt(20), ENDLESS)
            for leg in (done, cut, drained):
                await leg.until(lambda leg: leg.tokens)
            for running in deployment.decode:
                running.signal(signal.SIGTERM)
            await two.until_heard(lambda link: link.load.draining)
            hasty.signal(signal.SIGTERM)
            ends = [await done.end(), await cut.end(), await drained.end()]
            assert ends == ["done", "drained", "drained"]
            assert cut.detail == "the instance stops"
        for running in deployment.decode:
            assert await asyncio.to_thread(running.process.wait, 15) == 0
            found = running.announcement()
            assert found is not None and found.state == "stopped"
    finally:
        deployment.stop()


async def test_what_is_left_when_a_process_of_a_deployment_is_told_to_end_is_drained_before_it_does(
    tmp_path: Path, long_model: Path
) -> None:
    deployment = Deployment(tmp_path)
    try:
        for role in ("prefill", "decode"):
            command = [sys.executable, "-m", f"biphase.{role}_worker", *flags(long_model, 520, 16_384)]
            command += ["--drain-s", "0"]
            deployment.decode.append(deployment.spawn(role, command))
        for running in deployment.decode:
            await asyncio.to_thread(running.wait_ready)
        prefill, decode = deployment.decode
        async with LinkClient(prefill.address) as one, LinkClient(decode.address) as two:
            unpulled = await one.open_prefill(prompt(20), ENDLESS)
            running_leg = await two.open_decode(prompt(20), ENDLESS)
            for leg in (unpulled, running_leg):
                await leg.until(lambda leg: leg.tokens)
            for running in deployment.decode:
                running.signal(signal.SIGTERM)
            for leg in (unpulled, running_leg):
                assert await leg.end() == "drained" and leg.detail == "the instance stops"
        for running in deployment.decode:
            assert await asyncio.to_thread(running.process.wait, 15) == 0
    finally:
        deployment.stop()


async def test_a_retired_instance_ends_at_once(tmp_path: Path, long_model: Path) -> None:
    deployment = Deployment(tmp_path)
    try:
        retired = deployment.spawn(
            "retired", [sys.executable, "-m", "biphase.decode_worker", *flags(long_model, 520, 16_384)]
        )
        deployment.decode.append(retired)
        await asyncio.to_thread(retired.wait_ready)
        async with LinkClient(retired.address) as link:
            running = await link.open_decode(prompt(20), ENDLESS)
            await running.until(lambda leg: leg.tokens)
            async with LinkClient(retired.address, kind="controller", epoch=1) as controller:
                await controller.send(retire=worker_pb2.Retire(reason="incarnation 7 has taken its place"))
                assert await running.end() == "cancelled"
                assert running.detail == "retired retires: incarnation 7 has taken its place"
        assert await asyncio.to_thread(retired.process.wait, 15) == 0
    finally:
        deployment.stop()
