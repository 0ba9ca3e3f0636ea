"""The Ray backend. Every Ray call of biphase is in this file.

Processes are detached named actors ``<process>#<incarnation>`` in the namespace ``biphase-<deployment>``, with
``max_restarts=0``: lives are the controller's business. Only ranks hold CPUs. With ``RAY_ADDRESS`` unset the supervisor
starts a local cluster of its own and ends it with itself; somebody else's cluster is joined only by that variable.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import ray
from ray._private import node as ray_node
from ray._private import state as ray_state
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from biphase.cluster.backend import Handle, Kind, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.gpus import WHOLE, GpuPart, divide, host_gpus, in_parts
from biphase.cluster.ray_actor import ProcessActor, host_id
from biphase.protos.errors import SetupError, one_line
from biphase.protos.process import Announcement

OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of ours goes through it; this is near the least that Ray takes."""
LONG_POLL_S = 60.0
UNAVAILABLE_RETRY_S = 0.2
KILL_WAIT_S = 5.0
PROBE_S = 5.0
RELEASE_S, RELEASE_POLL_S = 5.0, 0.1
ACTOR_CONCURRENCY = 8
"""Long polls of the supervisor, of the controller and of a controller's former life, and a stop, at once."""
logger = logging.getLogger("biphase.cluster.ray")
T = TypeVar("T")


class RayHandle:
    """One actor. On this host its end is seen by a pidfd, at once; elsewhere by Ray, after about 2 s."""

    def __init__(self, *, name: str, kind: Kind, incarnation: int, actor: Any) -> None:
        self.name, self.kind, self.incarnation, self.actor = name, kind, incarnation, actor
        self.pid = 0
        self.end: str | None = None
        self.newest: Announcement | None = None
        self.changed = asyncio.Event()
        self._gone = asyncio.Event()
        self._pidfd = -1
        self._main_end: str | None = None
        self._follow = asyncio.create_task(self._follow_actor())

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.pid,)

    async def ended(self) -> str:
        await self._gone.wait()
        assert self.end is not None
        return self.end

    def kill(self) -> None:
        """End the process: by Ray, and by its pid where that is ours (a stopped process obeys nothing else)."""
        with suppress(Exception):  # an actor that is gone already, or a cluster that is
            ray.kill(self.actor, no_restart=True)
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def release(self) -> None:
        """Stop watching; the actor goes on."""
        self._follow.cancel()
        self._close_pidfd()

    async def _follow_actor(self) -> None:
        """Long-poll the actor until it is gone. One whose main has ended idles on: it is ended here."""
        version = 0
        while True:
            try:
                version, text, end, host = await self.actor.announcement.remote(version, LONG_POLL_S)
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_RETRY_S)
                continue
            except ray.exceptions.RayActorError as error:
                self._set_end(_death_of(error))
                return
            if text is not None:
                self.newest = Announcement.from_json(text)
                self._watch_process(self.newest.pid, host)
            self.changed.set()
            if end is not None:
                self._main_end = end
                self.kill()

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
            self.changed.set()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def __repr__(self) -> str:
        return f"<RayHandle {self.name}#{self.incarnation} pid {self.pid or '?'} {self.end or 'runs'}>"


class RayBackend:
    """Actors of one deployment. ``owner``: the supervisor's, which starts or joins the cluster and leaves it."""

    def __init__(self, deployment_name: str, *, owner: bool) -> None:
        self._namespace = f"biphase-{deployment_name}"
        self._owner = owner
        self._joined = bool(os.environ.get("RAY_ADDRESS"))
        self._handles: dict[tuple[str, int], RayHandle] = {}
        # One thread for all blocking Ray calls. It lives as long as the backend: Ray's own processes are told by the
        # kernel when the thread that started them ends.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="biphase-ray")

    async def open(self) -> None:
        if self._owner:
            await self._call(self._connect)

    def _connect(self) -> None:
        options: dict[str, Any] = {"namespace": self._namespace, "log_to_driver": False, "configure_logging": False}
        try:
            if self._joined:
                _probe(os.environ["RAY_ADDRESS"])
                ray.init(address=os.environ["RAY_ADDRESS"], **options)
                return
            with _lean_head():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    num_gpus=len(host_gpus()),
                    **options,
                )
        except Exception as error:
            where = os.environ["RAY_ADDRESS"] if self._joined else "a local cluster"
            raise SetupError(f"Ray ({where}) cannot be used: {one_line(error)}") from error

    async def check(self, specs: Sequence[ProcessSpec]) -> None:
        """First fit of the GPUs and CPUs asked for on those that are free, host by host.

        A share must lie in one GPU: ``divide`` has seen to that, over all GPUs of the cluster. What is free Ray tells by
        host and not by GPU, so where others hold fractions, what passes here may still have to wait for them.

        What was just killed gives back its own a little later: where the hosts are large enough, wait for it.
        """
        everything = await self._call(_all_there)
        await self._call(partial(self._keep_num_gpus, sum(room.gpus // WHOLE for room in everything)))
        parts = await self._call(partial(self._parts, specs[0].deployment))
        rooms = [_Room(in_parts(parts.get(spec.name, GpuPart()).share), in_parts(spec.cpus)) for spec in specs]
        asked = sorted((one for one in rooms if one != _NOTHING), reverse=True)
        patient = _fits(asked, everything)
        deadline_s = time.monotonic() + (RELEASE_S if patient else 0.0)
        while not _fits(asked, free := await self._call(_all_free)):
            if time.monotonic() >= deadline_s:
                hosts = f" on {len(free)} hosts" if len(free) > 1 else ""
                wanted, there = _sum(asked), _sum(free)
                short_of_gpus = not _fits([_Room(one.gpus, 0) for one in asked], free)
                raise SetupError(
                    f"{len(asked)} instances ask Ray for {wanted.gpus / WHOLE:g} GPUs, "
                    f"{there.gpus / WHOLE:g} are free{hosts}: lower gpus (a fraction shares a GPU, 0 is the CPU) or replicas"
                    if short_of_gpus
                    else f"{len(asked)} instances ask Ray for {wanted.cpus / WHOLE:g} CPUs, "
                    f"{there.cpus / WHOLE:g} are free{hosts}: lower cpus (0 is allowed) or replicas"
                )
            await asyncio.sleep(RELEASE_POLL_S)

    async def start(self, spec: ProcessSpec) -> RayHandle:
        actor = await self._call(lambda: self._create(spec))
        handle = RayHandle(name=spec.name, kind=spec.kind, incarnation=spec.incarnation, actor=actor)
        self._handles[spec.name, spec.incarnation] = handle
        return handle

    def _parts(self, deployment: Deployment) -> dict[str, GpuPart]:
        num_gpus = int(internal_kv._internal_kv_get(self._num_gpus_key()) or 0)
        return divide(deployment, num_gpus, where="the Ray cluster")

    def _keep_num_gpus(self, num_gpus: int) -> None:
        """As many as there are at the start, for every life: a host that goes must change no instance's share."""
        internal_kv._internal_kv_put(self._num_gpus_key(), str(num_gpus).encode(), overwrite=True)

    def _num_gpus_key(self) -> bytes:
        return f"{self._namespace}:gpus".encode()

    def _create(self, spec: ProcessSpec) -> Any:
        spec = replace(spec, gpus=self._parts(spec.deployment).get(spec.name, GpuPart()).share)
        strategy: Any = "DEFAULT"
        if spec.kind in ("router", "controller"):  # where the user is: they listen on this host's addresses
            here = ray.get_runtime_context().get_node_id()
            strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        options = {
            "name": _actor_name(spec.name, spec.kind, spec.incarnation),
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": spec.cpus,
            "num_gpus": spec.gpus,
            "max_restarts": 0,
            "max_concurrency": ACTOR_CONCURRENCY,
            "scheduling_strategy": strategy,
        }
        try:
            return ray.remote(ProcessActor).options(**options).remote(spec.to_json())
        except Exception as error:
            raise SetupError(f"Ray does not start {spec.name}: {one_line(error)}") from error

    async def adopt(self) -> list[Handle]:
        for name in await self._call(self._names):
            process, kind, incarnation = _parse_actor_name(name)
            if (process, incarnation) not in self._handles:
                with suppress(ValueError):  # gone since
                    actor = await self._call(partial(ray.get_actor, name, namespace=self._namespace))
                    self._handles[process, incarnation] = RayHandle(
                        name=process, kind=kind, incarnation=incarnation, actor=actor
                    )
        return [handle for handle in self._handles.values() if handle.end is None]

    def _names(self) -> list[str]:
        found = ray.util.list_named_actors(all_namespaces=True)
        return [actor["name"] for actor in found if actor["namespace"] == self._namespace]

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        assert isinstance(handle, RayHandle)
        seen: Announcement | None = None
        while True:
            handle.changed.clear()
            ended = handle.end is not None
            if handle.newest is not None and handle.newest != seen:
                seen = handle.newest
                yield seen
            if ended:
                return
            await handle.changed.wait()

    async def ask_to_stop(self, handle: Handle) -> None:
        assert isinstance(handle, RayHandle)
        with suppress(ray.exceptions.RayActorError):
            handle.actor.stop.remote()

    async def kill(self, handle: Handle) -> None:
        assert isinstance(handle, RayHandle)
        await self._call(handle.kill)

    async def save_state(self, text: str) -> None:
        await self._call(lambda: internal_kv._internal_kv_put(self._state_key(), text.encode(), overwrite=True))

    async def load_state(self) -> str | None:
        found = await self._call(lambda: internal_kv._internal_kv_get(self._state_key()))
        return found.decode() if found is not None else None

    def _state_key(self) -> bytes:
        return f"{self._namespace}:state".encode()

    async def close(self) -> None:
        if self._owner and ray.is_initialized():
            handles = await self.adopt()
            for handle in handles:
                await self.kill(handle)
            waits = [asyncio.ensure_future(handle.ended()) for handle in handles]
            if waits:
                await asyncio.wait(waits, timeout=KILL_WAIT_S)
            for wait in waits:
                wait.cancel()
        for own in self._handles.values():
            own.release()
        if self._owner:
            await self._call(ray.shutdown)
        self._thread.shutdown(wait=True)

    async def _call(self, function: Callable[[], T]) -> T:
        """A blocking Ray call, outside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _probe(address: str) -> None:
    """Raise OSError within seconds when nobody listens at ``address`` (host:port); Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()


@contextmanager
def _lean_head() -> Iterator[None]:
    """A local cluster without the processes that biphase has no use for; halves the start (docs/decisions).

    Ray has no options for the autoscaler's monitor, the log monitor (log_to_driver is off) and the dashboard's server
    (which ``include_dashboard=False`` only makes smaller). A Ray that starts them otherwise just starts them.
    """
    unused = ("start_monitor", "start_log_monitor", "start_api_server")
    before = {name: getattr(ray_node.Node, name) for name in unused if hasattr(ray_node.Node, name)}
    try:
        for name in before:
            setattr(ray_node.Node, name, lambda self, **options: None)
        yield
    finally:
        for name, method in before.items():
            setattr(ray_node.Node, name, method)


class _Room(NamedTuple):
    """What an instance asks for, or what a host has, in ten-thousandths."""

    gpus: int
    cpus: int


_NOTHING = _Room(0, 0)


def _sum(rooms: Sequence[_Room]) -> _Room:
    return _Room(sum(room.gpus for room in rooms), sum(room.cpus for room in rooms))


def _fits(asked: Sequence[_Room], hosts: Sequence[_Room]) -> bool:
    """Whether every demand, the largest first, finds a host with that much left."""
    left = sorted(hosts, reverse=True)
    for one in asked:
        fitting = next((i for i, there in enumerate(left) if there.gpus >= one.gpus and there.cpus >= one.cpus), None)
        if fitting is None:
            return False
        left[fitting] = _Room(left[fitting].gpus - one.gpus, left[fitting].cpus - one.cpus)
    return True


def _room_of(resources: Mapping[str, Any]) -> _Room:
    return _Room(in_parts(resources.get("GPU", 0.0)), in_parts(resources.get("CPU", 0.0)))


def _all_there() -> list[_Room]:
    """What each living host has."""
    return [_room_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _all_free() -> list[_Room]:
    """What is free, host by host."""
    return [_room_of(resources) for resources in ray_state.available_resources_per_node().values()] or [_NOTHING]


def _actor_name(name: str, kind: Kind, incarnation: int) -> str:
    return f"{kind}/{name}#{incarnation}"


def _parse_actor_name(text: str) -> tuple[str, Kind, int]:
    kind, _, rest = text.partition("/")
    name, _, incarnation = rest.rpartition("#")
    return name, cast("Kind", kind), int(incarnation)


def _death_of(error: BaseException) -> str:
    """Ray's many lines on a death as a few words."""
    text = one_line(error)
    return (
        "killed" if "ray.kill" in text else "its process is gone" if "SYSTEM_ERROR" in text or "died" in text else text
    )
