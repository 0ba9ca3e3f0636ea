"""Rank 0's part in bringing an instance up: wait for the others, load with them, agree on what all have, serve as one."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine, Progress
from biphase.engine.engine_thread import EngineThread
from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.store import late_line, open_store, waiting_line
from biphase.engine.ranks.channel import LeaderChannel
from biphase.engine.ranks.connection import Message
from biphase.engine.ranks.ending import EndWhenLost, close_engine
from biphase.engine.ranks.joining import join_groups, membership
from biphase.engine.ranks.leader_engine import LeaderEngine, agree_on_blocks
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.errors import Internal, SetupError
from biphase.protos.process import Announcer

_log = logging.getLogger(__name__)

OWN_REASON_S = 1.0
"""A rank that fails is often not alone: rank 0 has this long to find the same by itself, and says it then."""


class Leading:
    """Owns the engine thread and the groups. ``failed``: what a follower's set-up failed of."""

    def __init__(self, config: WorkerConfig, channel: LeaderChannel) -> None:
        self.channel = channel
        self.failed: Future[Exception] = Future()
        self.thread = EngineThread(config.step_engine, self._load)
        self._config = config
        self._groups: RankGroups | None = None
        self._serves = False
        self._loaded = _FromAll(channel, "loaded")
        self._serving = _FromAll(channel, "serving")
        channel.subscribe("failed", self._on_failed, direct=True)

    def _load(self, engine_config: EngineConfig, progress: Progress) -> Engine:
        """In the engine thread, with all ranks there. Raises SetupError."""
        config = self._config
        store, port = open_store(config.rank_host)
        host = config.advertise_host or config.host
        self.channel.broadcast(
            {"kind": "load", "store_host": host, "store_port": port, "incarnation": config.incarnation}
        )
        progress("connecting the ranks", 0.0)
        self._groups = join_groups(config, engine_config, store, progress)
        own = Engine.load(engine_config, progress, groups=self._groups)
        facts = self._loaded.wait("loaded", config.load_timeout_s, lambda line: progress(line, 1.0))
        check_alike(facts_of(own), facts)
        num_blocks = min(own.num_blocks, *(their["num_blocks"] for their in facts.values()))
        agree_on_blocks(own, num_blocks)
        self.channel.broadcast({"kind": "serve", "num_blocks": num_blocks})
        self._serving.wait("begun to serve", config.load_timeout_s, lambda line: progress(line, 1.0))
        self.channel.expect_steady_beats()
        self._serves = True
        return LeaderEngine(
            own,
            self.channel,
            step_timeout_s=config.step_timeout_s,
            kv_bytes=num_blocks * (own.layout.block_bytes + sum(their["block_bytes"] for their in facts.values())),
            threads=own.threads + sum(their["threads"] for their in facts.values()),
        )

    async def close(self, announcer: Announcer, error: BaseException | None = None) -> None:
        """End the engine thread and drop the groups."""
        await close_engine(self.thread, announcer, error)
        if self._groups is not None:
            self._groups.close()

    def _on_failed(self, rank: int, message: Message) -> None:
        """In the channel's thread."""
        self.channel.excuse(rank)
        kind = SetupError if message["error"] == SetupError.__name__ else Internal
        error = kind(f"rank {rank}: {message['text']}")
        with contextlib.suppress(Exception):
            self.failed.set_result(error)
        self._loaded.fail(error)
        self._serving.fail(error)
        if self._serves:  # it failed of turning to another role
            self.channel.lose(str(error))


class _FromAll:
    """One message of a kind from every follower."""

    def __init__(self, channel: LeaderChannel, kind: str) -> None:
        self._answers: dict[int, Future[dict[str, Any]]] = {rank: Future() for rank in channel.followers}
        channel.subscribe(kind, self._answer, direct=True)

    def _answer(self, rank: int, message: Message) -> None:
        if not self._answers[rank].done():  # another rank has failed meanwhile
            self._answers[rank].set_result(message)

    def wait(self, done: str, within_s: float, on_wait: Callable[[str], None]) -> dict[int, dict[str, Any]]:
        """By rank, what they say when they have ``done`` it; ``on_wait`` hears for whom we wait. Raises what ``fail`` was
        told, and SetupError in time: a rank that hangs may beat for ever."""
        until_s, num_ranks = time.monotonic() + within_s, 1 + len(self._answers)
        while missing := [rank for rank, answer in self._answers.items() if not answer.done()]:
            on_wait(waiting_line(done, missing, num_ranks))
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise SetupError(late_line(done, missing, num_ranks, within_s))
            wait([self._answers[rank] for rank in missing], left_s, FIRST_COMPLETED)
        return {rank: answer.result() for rank, answer in self._answers.items()}

    def fail(self, error: Exception) -> None:
        for answer in self._answers.values():
            with contextlib.suppress(Exception):
                answer.set_exception(error)


@contextlib.asynccontextmanager
async def leading(config: WorkerConfig, announcer: Announcer, stop: asyncio.Event) -> AsyncIterator[Leading | None]:
    """Rank 0 with all ranks connected; None when told to stop before they were. Left in order, it stops the others; left
    by an error, they end as its losers. The loss of one ends the process, now and until then."""
    channel = LeaderChannel(membership(config), config.host, config.rank_port)
    try:
        channel.lost.add_done_callback(EndWhenLost(announcer))
        channel.subscribe("stop", lambda rank, message: stop.set())
        num_ranks = config.plan.num_ranks
        announcer.update(rank_address=config.address(channel.port))
        gathering = asyncio.create_task(
            channel.gather(
                config.join_timeout_s,
                lambda num: announcer.update(detail=f"{num} of {num_ranks} ranks are there", progress=0.0),
            )
        )
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({gathering, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not gathering.done():
            gathering.cancel()
        await asyncio.wait({gathering, stopping})
        if gathering.cancelled():
            yield None
        else:
            gathering.result()
            leader = Leading(config, channel)
            try:
                yield leader
            except BaseException as error:
                channel.close()
                await leader.close(announcer, error)
                raise
            await leader.close(announcer)
    except BaseException:
        channel.close()
        raise
    await channel.stop()


def check_alike(ours: dict[str, Any], facts: dict[int, dict[str, Any]]) -> None:
    """Raises SetupError when a rank has loaded something else than rank 0."""
    for rank, theirs in facts.items():
        for name in ("model_hash", "block_size", "dtype", "kv_dtype"):
            if theirs[name] != ours[name]:
                other, own = (
                    value.hex() if isinstance(value, bytes) else value for value in (theirs[name], ours[name])
                )
                raise SetupError(f"rank {rank} has {name} {other}, rank 0 has {own}")


def facts_of(engine: Engine) -> dict[str, Any]:
    """What a rank says about itself when it has loaded."""
    return {
        "num_blocks": engine.num_blocks,
        "block_bytes": engine.layout.block_bytes,
        "threads": engine.threads,
        "model_hash": engine.model_info.model_hash,
        "block_size": engine.layout.block_size,
        "dtype": engine.config.dtype,
        "kv_dtype": engine.config.kv_dtype,
    }
