"""The pulls of a decode instance on ranks other than 0: rank 0 gives them out, takes them back, and hears how they ended.

rank 0      kv.pull   {number, job}
            kv.cancel {number}
the others  kv.pulled {number, failure, text, ...}   nothing of that job writes here any more
"""

import asyncio
import logging
from typing import Any

from biphase.kvtransfer.pull_job import PartsPulled, PullJob
from biphase.kvtransfer.rank_pull import RankPuller
from biphase.kvtransfer.ranks import FollowerLink, LeaderLink, Message
from biphase.kvtransfer.wire import SourceRefused, SourceUnreachable
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)


class LeaderPulls:
    """The other ranks as rank 0's puller sees them (puller.PullFollowers)."""

    def __init__(self, link: LeaderLink) -> None:
        self._link = link
        self._next_number = 0
        self._waiting: dict[tuple[int, int], asyncio.Future[Message]] = {}
        link.subscribe("kv.pulled", self._pulled)

    def detach(self) -> None:
        """No pull runs, and none begins any more."""
        self._link.unsubscribe("kv.pulled")

    async def pull(self, rank: int, job: PullJob) -> PartsPulled:
        """Raises SourceUnreachable or SourceRefused, and CancelledError only when the rank has ended it."""
        number = self._next_number
        self._next_number += 1
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[rank, number] = answer
        self._link.send(rank, {"kind": "kv.pull", "number": number, "job": job.to_message()})
        cancelled = False
        while not answer.done():
            try:
                await asyncio.wait([answer])
            except asyncio.CancelledError:
                if not cancelled:
                    cancelled = True
                    self._link.send(rank, {"kind": "kv.cancel", "number": number})
        if cancelled:
            raise asyncio.CancelledError
        message = answer.result()
        if message["failure"] == "unreachable":
            raise SourceUnreachable(f"rank {rank}: {message['text']}")
        if message["failure"]:
            raise SourceRefused(f"rank {rank}: {message['text']}")
        return PartsPulled(**message["pulled"])

    def counters(self) -> dict[str, int]:
        return {"pulls_of_ranks": len(self._waiting)}

    def _pulled(self, rank: int, message: Message) -> None:
        self._waiting.pop((rank, message["number"])).set_result(message)


class FollowerPulls:
    """Runs what rank 0 gives out."""

    def __init__(self, link: FollowerLink, puller: RankPuller) -> None:
        self._link = link
        self._puller = puller
        self._tasks: dict[int, asyncio.Task[Message]] = {}
        link.subscribe("kv.pull", self._pull)
        link.subscribe("kv.cancel", self._cancel)

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """End all, begin none; returns when none writes any more."""
        self._link.unsubscribe("kv.pull")
        self._link.unsubscribe("kv.cancel")
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _pull(self, message: Message) -> None:
        number = message["number"]
        task = asyncio.get_running_loop().create_task(self._run(PullJob.from_message(message["job"])))
        self._tasks[number] = task
        task.add_done_callback(lambda task: self._over(number, task))

    def _cancel(self, message: Message) -> None:
        task = self._tasks.get(message["number"])
        if task is not None:
            task.cancel()

    def _over(self, number: int, task: "asyncio.Task[Message]") -> None:
        del self._tasks[number]
        answer = {"failure": "cancelled", "text": "cancelled"} if task.cancelled() else task.result()
        self._link.send({"kind": "kv.pulled", "number": number, **answer})

    async def _run(self, job: PullJob) -> Message:
        try:
            pulled = await self._puller.pull(job)
        except SourceUnreachable as error:
            return {"failure": "unreachable", "text": one_line(error)}
        except SourceRefused as error:
            return {"failure": "refused", "text": one_line(error)}
        except Exception as error:  # noqa: BLE001 -- rank 0 must hear of it
            _log.exception("a pull of %s broke", job.instance)
            return {"failure": "refused", "text": f"the pull broke: {one_line(error)}"}
        fields: dict[str, Any] = {
            "num_bytes": pulled.num_bytes,
            "num_bad": pulled.num_bad,
            "fallbacks": pulled.fallbacks,
            "bytes_by_transport": pulled.bytes_by_transport,
            "carried_by": pulled.carried_by,
            "instead": pulled.instead,
            "tail_raw_bytes": pulled.tail_raw_bytes,
            "tail_wire_bytes": pulled.tail_wire_bytes,
            "tail_s": pulled.tail_s,
        }
        return {"failure": "", "text": "", "pulled": fields}
