"""The Ray backend: an instance is a placement group with one actor per rank, a router or controller one actor.

Actors and groups are detached and named (``ray_names``), actors with ``max_restarts=0``: lives are the controller's
business. Only ranks hold CPUs and GPUs. A group has one bundle per stage, which Ray never divides between hosts; stages
are packed where they fit. With ``RAY_ADDRESS`` unset the supervisor starts a local cluster of its own and ends it with
itself; somebody else's cluster is joined only by that variable. Ray is called in the ``ray_*`` modules and nowhere else.
"""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray
from ray._private import node as ray_node
from ray._private import state as ray_state
from ray._raylet import PlacementGroupID
from ray.experimental import internal_kv
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from biphase.cluster.backend import STATE, Handle, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.gpus import WHOLE, GpuPart, divide, host_gpus, share_of
from biphase.cluster.rank_group import MissingRank, RankGroup
from biphase.cluster.ray_actor import ProcessActor
from biphase.cluster.ray_names import ActorName, group_name, namespace_of
from biphase.cluster.ray_rank import RayRank
from biphase.cluster.ray_room import NOTHING, Room, bundles_of, fits, refusal, room_of, rooms_asked
from biphase.protos.errors import SetupError, one_line
from biphase.protos.process import Announcement

OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of ours goes through it; this is near the least that Ray takes."""
MAX_IDLE = 64
"""Instances that would find room are counted no further."""
KILL_WAIT_S = 5.0
PROBE_S = 5.0
RELEASE_S, RELEASE_POLL_S = 5.0, 0.1
ACTOR_CONCURRENCY = 8
"""Long polls of the supervisor, of the controller and of a controller's former life, a stop, and other ranks' looks for
rank 0, at once."""
T = TypeVar("T")


class RayGroup(RankGroup):
    """A group whose ranks tell when there is news."""

    def __init__(self, changed: asyncio.Event, **group: Any) -> None:
        super().__init__(**group)
        self.changed = changed


class RayBackend:
    """Actors of one deployment. ``owner``: the supervisor's, which starts or joins the cluster and leaves it."""

    kill_patience_s: float | None = 2.0

    def __init__(self, deployment_name: str, *, owner: bool) -> None:
        self._namespace = namespace_of(deployment_name)
        self._owner = owner
        self._joined = bool(os.environ.get("RAY_ADDRESS"))
        self._groups: dict[tuple[str, int], RayGroup] = {}
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
        """First fit of the GPUs and CPUs that each stage asks for on those that are free, host by host.

        A share must lie in one GPU: ``divide`` has seen to that, over all GPUs of the cluster. What is free Ray tells by
        host and not by GPU, so where others hold fractions, what passes here may still have to wait for them.

        What was just killed gives back its own a little later: where the hosts are large enough, wait for it.
        """
        everything = await self._call(_all_there)
        await self._call(partial(self._keep_num_gpus, sum(room.gpus // WHOLE for room in everything)))
        parts = await self._call(partial(self._parts, specs[0].deployment))
        asked = rooms_asked(specs, parts)
        patient = fits(asked, everything)
        deadline_s = time.monotonic() + (RELEASE_S if patient else 0.0)
        while not fits(asked, free := await self._call(_all_free)):
            if time.monotonic() >= deadline_s:
                raise SetupError(refusal(specs, asked, free))
            await asyncio.sleep(RELEASE_POLL_S)

    async def start(self, spec: ProcessSpec) -> RayGroup:
        actors = await self._call(partial(self._create, spec))
        return self._hold(ActorName(name=spec.name, kind=spec.kind, incarnation=spec.incarnation), actors)

    def _hold(self, life: ActorName, actors: Sequence[Any | None]) -> RayGroup:
        """The handle of a life's actors, in the order of their ranks; None for one that is gone."""
        changed = asyncio.Event()
        placement = group_name(self._namespace, life.name, life.incarnation)
        in_group = life.kind == "prefill" or life.kind == "decode"
        group = RayGroup(
            changed,
            name=life.name,
            kind=life.kind,
            incarnation=life.incarnation,
            ranks=[
                RayRank(actor, changed, self._call) if actor is not None else MissingRank("its actor is gone")
                for actor in actors
            ],
            on_gone=partial(self._call, partial(_remove_groups, {placement})) if in_group else None,
        )
        self._groups[life.name, life.incarnation] = group
        return group

    def _parts(self, deployment: Deployment) -> dict[str, GpuPart]:
        num_gpus = int(internal_kv._internal_kv_get(self._num_gpus_key()) or 0)
        return divide(deployment, num_gpus, where="the Ray cluster")

    def _share(self, spec: ProcessSpec) -> float:
        if spec.kind != "prefill" and spec.kind != "decode":
            return 0.0
        num_gpus = int(internal_kv._internal_kv_get(self._num_gpus_key()) or 0)
        return share_of(spec.deployment, spec.name, spec.kind, num_gpus, where="the Ray cluster")

    def _keep_num_gpus(self, num_gpus: int) -> None:
        """As many as there are at the start, for every life: a host that goes must change no instance's share."""
        internal_kv._internal_kv_put(self._num_gpus_key(), str(num_gpus).encode(), overwrite=True)

    def _num_gpus_key(self) -> bytes:
        return f"{self._namespace}:gpus".encode()

    def _create(self, spec: ProcessSpec) -> list[Any]:
        """All actors of a life, in the order of their ranks. Ray starts them when their bundles are there."""
        share = self._share(spec)
        spec = replace(spec, gpus=share, host=spec.host if len(_all_there()) == 1 else "")
        key = secrets.token_hex(16) if spec.plan.num_ranks > 1 else ""
        try:
            place = self._placement(spec, share)
            return [
                ray.remote(ProcessActor)
                .options(
                    name=str(_actor_of(spec, rank)),
                    namespace=self._namespace,
                    lifetime="detached",
                    num_cpus=spec.cpus,
                    num_gpus=share,
                    max_restarts=0,
                    max_concurrency=ACTOR_CONCURRENCY,
                    scheduling_strategy=place(spec.plan.stage_of(rank)),
                )
                .remote(replace(spec, rank=rank, rank_key=key).to_json())
                for rank in range(spec.plan.num_ranks)
            ]
        except Exception as error:
            raise SetupError(f"Ray does not start {spec.name}: {one_line(error)}") from error

    def _placement(self, spec: ProcessSpec, share: float) -> Callable[[int], Any]:
        """Where the ranks of a stage go."""
        if spec.kind in ("router", "controller"):  # where the user is: they listen on this host's addresses
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            return lambda stage: here
        group = placement_group(
            bundles_of(spec, share),
            strategy="PACK",
            name=group_name(self._namespace, spec.name, spec.incarnation),
            lifetime="detached",
        )
        return lambda stage: PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=stage)

    @property
    def can_grow(self) -> bool:
        return False

    async def idle(self, spec: ProcessSpec) -> int:
        """By what Ray says is free now, host by host."""
        share = await self._call(partial(self._share, spec))
        asked = rooms_asked([spec], {spec.name: GpuPart(share=share)})
        free = await self._call(_all_free)
        found = 0
        while asked and found < MAX_IDLE and fits(sorted(asked * (found + 1), reverse=True), free):
            found += 1
        return found if asked else MAX_IDLE

    async def ask_node(self, spec: ProcessSpec) -> str:
        return "this cluster has no autoscaler that could add a node"

    async def withdraw_node(self, name: str) -> None:
        pass

    async def adopt(self) -> list[Handle]:
        """The lives that have actors, and whatever ranks they still have. Groups of those that have none are given back."""
        found: dict[tuple[str, int], dict[int, ActorName]] = {}
        for actor in await self._call(self._names):
            found.setdefault((actor.name, actor.incarnation), {})[actor.rank] = actor
        for key, ranks in found.items():
            if key not in self._groups:
                life = next(iter(ranks.values()))
                actors = await self._call(partial(self._actors, [ranks.get(rank) for rank in range(life.num_ranks)]))
                if any(actor is not None for actor in actors):
                    self._hold(life, actors)
        living: list[Handle] = [group for group in self._groups.values() if group.end is None]
        kept = {group_name(self._namespace, group.name, group.incarnation) for group in living}
        await self._call(partial(self._remove_forgotten, kept))
        return living

    def _names(self) -> list[ActorName]:
        found = ray.util.list_named_actors(all_namespaces=True)
        return [ActorName.parse(actor["name"]) for actor in found if actor["namespace"] == self._namespace]

    def _actors(self, names: Sequence[ActorName | None]) -> list[Any | None]:
        actors: list[Any | None] = []
        for name in names:
            actors.append(None)
            with suppress(ValueError):  # gone since
                if name is not None:
                    actors[-1] = ray.get_actor(str(name), namespace=self._namespace)
        return actors

    def _remove_forgotten(self, kept: set[str]) -> None:
        """Placement groups whose lives are over, or had not begun when their controller died."""
        ours = {name for name in _groups_there().values() if name.startswith(f"{self._namespace}/")}
        _remove_groups(ours - kept)

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        assert isinstance(handle, RayGroup)
        seen: Announcement | None = None
        gone = asyncio.ensure_future(handle.ended())
        try:
            while True:
                handle.changed.clear()
                ended, newest = handle.end is not None, handle.word()
                if newest is not None and newest != seen:
                    seen = newest
                    yield newest
                if ended:
                    return
                news = asyncio.ensure_future(handle.changed.wait())
                await asyncio.wait([news, gone], return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
        finally:
            gone.cancel()

    async def ask_to_stop(self, handle: Handle) -> None:
        assert isinstance(handle, RayGroup)
        await handle.ask_to_stop()

    async def kill(self, handle: Handle) -> None:
        assert isinstance(handle, RayGroup)
        await handle.kill()

    async def save_state(self, text: str, key: str = STATE) -> None:
        kept = self._kept_key(key)
        await self._call(lambda: internal_kv._internal_kv_put(kept, text.encode(), overwrite=True))

    async def load_state(self, key: str = STATE) -> str | None:
        kept = self._kept_key(key)
        found = await self._call(lambda: internal_kv._internal_kv_get(kept))
        return found.decode() if found is not None else None

    def _kept_key(self, key: str) -> bytes:
        return f"{self._namespace}:{key}".encode()

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
        for own in self._groups.values():
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


def _all_there() -> list[Room]:
    """What each living host has."""
    return [room_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _all_free() -> list[Room]:
    """What is free, host by host."""
    return [room_of(resources) for resources in ray_state.available_resources_per_node().values()] or [NOTHING]


def _actor_of(spec: ProcessSpec, rank: int) -> ActorName:
    return ActorName(
        name=spec.name, kind=spec.kind, incarnation=spec.incarnation, rank=rank, num_ranks=spec.plan.num_ranks
    )


def _groups_there() -> dict[str, str]:
    """The names of all placement groups of the cluster, by id."""
    return {key: group["name"] for key, group in placement_group_table().items() if group["state"] != "REMOVED"}


def _remove_groups(names: set[str]) -> None:
    """What runs in them ends with them. Those that are not there are done."""
    for key, name in _groups_there().items() if names else ():
        if name in names:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
