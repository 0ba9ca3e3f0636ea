"""One actor, as the Ray backend sees it: followed by a long poll, and by a pidfd where it runs on this host."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray

from biphase.cluster.ray_actor import host_id
from biphase.cluster.ray_names import ActorName
from biphase.protos.errors import SetupError, one_line
from biphase.protos.process import Announcement

LONG_POLL_S = 60.0
UNAVAILABLE_RETRY_S = 0.2
LOOK_EVERY_S = 0.1

CallRay = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Makes a blocking Ray call outside the loop. OSError: it is not done yet, and will be."""
logger = logging.getLogger("biphase.cluster.ray")


class RayRank:
    """On this host its end is seen at once, elsewhere by Ray after about 2 s. ``changed`` is set at every news.

    The actor may be a future: of one that waits for its place. SetupError in it ends the rank.
    """

    def __init__(self, actor: Any, changed: asyncio.Event, call: CallRay) -> None:
        self.pid = 0
        self.end: str | None = None
        self._coming: asyncio.Future[Any] | None = actor if isinstance(actor, asyncio.Future) else None
        self._actor: Any | None = None if self._coming is not None else actor
        self._changed, self._call = changed, call
        self._word: Announcement | None = None
        self._gone = asyncio.Event()
        self._pidfd = -1
        self._main_end: str | None = None
        self._follow = asyncio.create_task(self._follow_actor())

    def word(self) -> Announcement | None:
        return self._word

    async def ended(self) -> str:
        await self._gone.wait()
        assert self.end is not None
        return self.end

    async def ask_to_stop(self) -> None:
        if self._actor is None:
            self._set_end("was never placed")
            return
        with suppress(ray.exceptions.RayActorError):
            self._actor.stop.remote()

    async def kill(self) -> None:
        """By its pid where that is ours (a stopped process obeys nothing else), and by Ray."""
        if self._actor is None:
            self._set_end("was never placed")
            return
        if self.end is not None:
            return
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self._kill_actor(self._actor)

    async def _kill_actor(self, actor: Any) -> None:
        try:
            await self._call(partial(ray.kill, actor, no_restart=True))
        except OSError as error:
            logger.warning("an actor is killed later: %s", error)
        except Exception as error:  # noqa: BLE001 -- an actor that is gone already, or a cluster that is
            logger.debug("an actor is not killed: %s", one_line(error))

    def release(self) -> None:
        self._follow.cancel()
        self._close_pidfd()

    async def _follow_actor(self) -> None:
        """Until it is gone. An actor whose main has ended idles on: it is ended here."""
        if self._coming is not None:
            try:
                self._actor = await self._coming
            except SetupError as error:
                self._set_end(one_line(error))
                return
            if self.end is not None:  # wanted no more meanwhile
                await self._kill_actor(self._actor)
                return
        assert self._actor is not None
        version = 0
        while True:
            try:
                version, text, end, host = await self._actor.announcement.remote(version, LONG_POLL_S)
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_RETRY_S)
                continue
            except ray.exceptions.RayActorError as error:
                self._set_end(_death_of(error))
                return
            if text is not None:
                self._word = Announcement.from_json(text)
                self._watch_process(self._word.pid, host)
            self._changed.set()
            if end is not None:
                self._main_end = end
                await self.kill()

    def _watch_process(self, pid: int, host: str) -> None:
        if self.pid:
            return
        self.pid = pid
        if host == host_id():
            with suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
                asyncio.get_running_loop().add_reader(self._pidfd, self._set_end, "its process is gone")

    def _set_end(self, reason: str) -> None:
        if self.end is None:
            self.end = self._main_end or reason
            self._close_pidfd()
            self._gone.set()
            self._changed.set()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def __repr__(self) -> str:
        return f"<RayRank pid {self.pid or '?'} {self.end or 'runs'}>"


async def leader_address(namespace: str, leader: ActorName) -> str:
    """Where rank 0 waits for the others of its life, once it says so."""
    while True:
        with suppress(ValueError, ray.exceptions.RayActorError):  # not there yet
            actor = await asyncio.to_thread(ray.get_actor, str(leader), namespace=namespace)
            _, text, _, _ = await actor.announcement.remote(-1, 0.0)
            address = Announcement.from_json(text).rank_address if text is not None else ""
            if address:
                return address
        await asyncio.sleep(LOOK_EVERY_S)


def _death_of(error: BaseException) -> str:
    """Ray's many lines on a death as a few words."""
    text = one_line(error)
    return (
        "killed" if "ray.kill" in text else "its process is gone" if "SYSTEM_ERROR" in text or "died" in text else text
    )
