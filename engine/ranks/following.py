"""A rank that is not rank 0, from its start to its end: it joins, loads, runs the steps it is sent, and stops when told.

Beside the steps it has a part that its phase makes: what rank 0's handling of KV needs from this rank's pool. When rank 0
turns to the other role it says so between two steps; then that part is made anew, and the engine stays as it is.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine, Progress
from biphase.engine.engine_thread import EngineThread
from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.store import join_store
from biphase.engine.ranks.channel import FindLeader, FollowerChannel
from biphase.engine.ranks.connection import Message
from biphase.engine.ranks.ending import EndWhenLost, close_engine
from biphase.engine.ranks.joining import announcing, join_groups, leader_of, membership
from biphase.engine.ranks.leader_engine import agree_on_blocks
from biphase.engine.ranks.leading import facts_of
from biphase.engine.ranks.step_message import done_message, failed_message, plan_of
from biphase.engine.step import StepResult
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.errors import Internal, one_line
from biphase.protos.process import Announcer
from biphase.protos.values import Role

_log = logging.getLogger(__name__)

FollowerPhase = Callable[[WorkerConfig, Engine, FollowerChannel], AbstractAsyncContextManager[None]]
"""Makes a phase's part in a rank that is not rank 0; closes what it made when left."""


async def serve_follower(
    config: WorkerConfig,
    announcer: Announcer,
    stop: asyncio.Event,
    phases: Mapping[Role, FollowerPhase],
    find_leader: FindLeader | None = None,
) -> None:
    """Run one rank until rank 0 says stop, in the role that rank 0 has; ``stop`` asks it to. Raises SetupError. Ends the process when rank 0 is lost."""
    announcer.update(state="loading", detail="looking for rank 0", log_file=config.log_file, rank=config.rank)
    channel = await _joined(config, stop, find_leader or leader_of(config))
    if channel is None:
        announcer.update(state="stopped", detail="")
        return
    try:
        await _follow(config, announcer, stop, phases, channel)
    finally:
        channel.close()
    announcer.update(state="stopped", detail="")
    _log.info("rank %d of %s has stopped", config.rank, config.name)


async def _joined(config: WorkerConfig, stop: asyncio.Event, find_leader: FindLeader) -> FollowerChannel | None:
    joining = asyncio.create_task(FollowerChannel.join(membership(config), find_leader, config.join_timeout_s))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({joining, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not joining.done():
        joining.cancel()
    await asyncio.wait({joining, stopping})
    return None if joining.cancelled() else joining.result()


async def _follow(
    config: WorkerConfig,
    announcer: Announcer,
    stop: asyncio.Event,
    phases: Mapping[Role, FollowerPhase],
    channel: FollowerChannel,
) -> None:
    channel.lost.add_done_callback(EndWhenLost(announcer))
    told = _Told(channel)
    asking = asyncio.create_task(_ask_to_stop(stop, channel))
    async with AsyncExitStack() as closing:
        closing.callback(asking.cancel)
        announcer.update(detail="waiting for the other ranks")
        load = await told.first("load")
        if load is None:
            return
        config = config.as_role(config.role, load["incarnation"])  # of the instance, whenever this process began
        announcer.update(incarnation=config.incarnation)
        loader = _Loader(config, load)
        closing.callback(loader.close)
        thread = EngineThread(config.step_engine, loader.load)
        closing.push_async_callback(close_engine, thread, announcer)
        try:
            engine = await thread.load(announcing(announcer))
            channel.send({"kind": "loaded", **facts_of(engine)})
            serve = await told.first("serve")
            if serve is None:
                return
            agree_on_blocks(engine, serve["num_blocks"])
            part = await _enter(phases[config.role], config, engine, channel, closing)
        except Exception as error:
            _tell_failure(channel, error)
            raise
        samples = config.rank == config.plan.rank_at(stage=config.plan.pp - 1, place=0)
        steps = _Steps(thread, channel, samples=samples)
        channel.subscribe("step", steps.begin, direct=True)
        channel.expect_steady_beats()
        channel.send({"kind": "serving"})
        while True:
            announcer.update(
                state="ready",
                detail="",
                progress=1.0,
                threads=engine.threads,
                kv_bytes=engine.kv_bytes,
                device=engine.device,
            )
            _log.info("rank %d of %s serves as %s: %d blocks", config.rank, config.name, config.role, engine.num_blocks)
            turn = await told.turn_or_stop()
            if turn is None:
                break
            try:
                steps.check_turn(turn)
                config = config.as_role(turn["role"], turn["incarnation"])
                await part.aclose()
                part = await _enter(phases[config.role], config, engine, channel, closing)
            except Exception as error:
                _tell_failure(channel, error)
                raise
            announcer.update(kind=config.role, incarnation=config.incarnation)
        announcer.update(state="draining", detail="stopping")


async def _enter(
    phase: FollowerPhase, config: WorkerConfig, engine: Engine, channel: FollowerChannel, closing: AsyncExitStack
) -> AsyncExitStack:
    """This rank's part in that phase, to be closed by what is returned, at the latest with ``closing``."""
    part = await closing.enter_async_context(AsyncExitStack())
    await part.enter_async_context(phase(config, engine, channel))
    return part


def _tell_failure(channel: FollowerChannel, error: Exception) -> None:
    channel.excuse()  # it may end before we have: our own reason is the one to end with
    channel.send({"kind": "failed", "error": type(error).__name__, "text": one_line(error)})


class _Told:
    """What rank 0 says beside steps: once how to load and to serve, then turns, lastly to stop."""

    def __init__(self, channel: FollowerChannel) -> None:
        self.stop = asyncio.Event()
        self._once: dict[str, asyncio.Future[Message]] = {}
        channel.subscribe("stop", lambda message: self.stop.set())
        self._turns: asyncio.Queue[Message] = asyncio.Queue()
        channel.subscribe("turn", self._turns.put_nowait)
        for kind in ("load", "serve"):
            self._once[kind] = asyncio.get_running_loop().create_future()
            channel.subscribe(kind, self._once[kind].set_result)

    async def first(self, kind: str) -> Message | None:
        """The message, None when told to stop before it."""
        stopping = asyncio.create_task(self.stop.wait())
        message = self._once[kind]
        ends: set[asyncio.Future[Any]] = {message, stopping}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return None if self.stop.is_set() else message.result()

    async def turn_or_stop(self) -> Message | None:
        """The next turn, None when told to stop."""
        turning, stopping = asyncio.create_task(self._turns.get()), asyncio.create_task(self.stop.wait())
        await asyncio.wait({turning, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (turning, stopping):
            task.cancel()
        return None if self.stop.is_set() else turning.result()


class _Loader:
    """Owns the groups."""

    def __init__(self, config: WorkerConfig, message: Message) -> None:
        self._config = config
        self._store_host: str = message["store_host"]
        self._store_port: int = message["store_port"]
        self._groups: RankGroups | None = None

    def load(self, engine_config: EngineConfig, progress: Progress) -> Engine:
        """In the engine thread."""
        store = join_store(self._store_host, self._store_port)
        self._groups = join_groups(self._config, engine_config, store, progress)
        return Engine.load(engine_config, progress, groups=self._groups)

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close()


class _Steps:
    """The steps that rank 0 sends, numbered by it from 0. ``samples``: whether this rank says what was drawn."""

    def __init__(self, thread: EngineThread, channel: FollowerChannel, *, samples: bool) -> None:
        self._thread = thread
        self._channel = channel
        self._samples = samples
        self._next_number = 0

    def begin(self, message: Message) -> None:
        """In the channel's thread."""
        number = message["number"]
        self._next_number = number + 1

        def over(step: "Future[StepResult]") -> None:
            error = step.exception()
            if error is not None:
                _log.error("step %d failed: %s: %s", number, type(error).__name__, one_line(error))
                self._channel.send(failed_message(number, error))
            else:
                self._channel.send(done_message(number, step.result().tokens if self._samples else None))

        self._thread.begin(plan_of(message)).add_done_callback(over)

    def check_turn(self, message: Message) -> None:
        """Raises Internal for a turn that is not after the last step which came here, and before the next one."""
        if message["number"] != self._next_number:
            text = f"told to turn at step {message['number']}, the next one here is {self._next_number}"
            raise Internal(text)


async def _ask_to_stop(stop: asyncio.Event, channel: FollowerChannel) -> None:
    """Rank 0 decides when; a process that is asked to stop asks it."""
    await stop.wait()
    channel.send({"kind": "stop"})
