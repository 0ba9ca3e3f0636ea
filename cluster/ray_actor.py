"""What runs inside a Ray worker: one process of the deployment, its asyncio main in a thread of its own.

Plain Python, turned into an actor by ``ray_backend``. Ray calls place, watch and stop it; no token passes here.
"""

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.process_runner import run_process
from biphase.cluster.ray_names import ActorName, namespace_of
from biphase.protos.process import Announcement, set_up_logging

Word = tuple[int, str | None, str | None, str]
"""(version, newest announcement as JSON, why the main has ended or None, host_id)."""


def host_id() -> str:
    """Equal in two processes when a pid of one means the same process to the other: same boot, same pid namespace."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _own_address() -> str:
    """Where other hosts of the cluster reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


class ProcessActor:
    """One life of one process. ``announcement`` is a long poll, so that an idle deployment exchanges next to nothing."""

    def __init__(self, spec_json: str) -> None:
        spec = ProcessSpec.from_json(spec_json)
        if not spec.host:
            spec = replace(spec, host=_own_address())
        os.environ.update(dict(spec.env))
        set_up_logging(spec.log_file)
        self._changed = threading.Condition()
        self._version = 0
        self._newest: str | None = None
        self._end: str | None = None
        self._host = host_id()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        threading.Thread(target=self._run, args=(spec,), name="biphase-main", daemon=True).start()

    def announcement(self, after: int, timeout_s: float) -> Word:
        """The newest word once it is newer than version ``after``, or what there is after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > after, timeout_s)
            return self._version, self._newest, self._end, self._host

    def stop(self) -> None:
        """Ask for a graceful end."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self, spec: ProcessSpec) -> None:
        leader = ActorName(name=spec.name, kind=spec.kind, incarnation=spec.incarnation, num_ranks=spec.plan.num_ranks)

        async def find_leader() -> str:
            from biphase.cluster.ray_rank import leader_address

            return await leader_address(namespace_of(spec.deployment.name), leader)

        async def main() -> int:
            self._loop = asyncio.get_running_loop()
            return await run_process(spec, self._publish, self._stop, find_leader)

        code = asyncio.run(main())
        self._loop = None
        with self._changed:
            self._end = f"ended with exit code {code}"
            self._version += 1
            self._changed.notify_all()

    def _publish(self, announcement: Announcement) -> None:
        with self._changed:
            self._newest = announcement.to_json()
            self._version += 1
            self._changed.notify_all()
