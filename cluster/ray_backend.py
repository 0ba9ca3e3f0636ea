"""The Ray backend: an instance is a placement group with one actor per rank, a router or controller one actor.

Actors and groups are detached and named (``ray_names``), actors with ``max_restarts=0``: lives are the controller's
business. Only ranks hold CPUs and GPUs. With ``RAY_ADDRESS`` unset the supervisor starts a local cluster of its own and ends
it with itself; somebody else's cluster is joined only by that variable. Ray is called in the ``ray_*`` modules and nowhere
else.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.experimental import internal_kv
from ray.util import placement_group_table

from biphase.cluster.backend import STATE, WAIT_VARIABLE, Handle, NodeView, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.gpus import WHOLE, GpuPart, divide, in_parts, share_of
from biphase.cluster.local_logs import LocalLogs
from biphase.cluster.log_source import LogSource
from biphase.cluster.rank_group import MissingRank
from biphase.cluster.ray_actor import ProcessActor
from biphase.cluster.ray_calls import RayCalls
from biphase.cluster.ray_connect import connect, is_joined
from biphase.cluster.ray_group import RayGroup
from biphase.cluster.ray_logs import RayLogs
from biphase.cluster.ray_names import ActorName, group_name, is_request, namespace_of
from biphase.cluster.ray_node_check import weights_lack, weights_of
from biphase.cluster.ray_nodes import NodeBook, hosts_now
from biphase.cluster.ray_placement import RayPlacement, groups_there, remove_groups
from biphase.cluster.ray_rank import RayRank
from biphase.cluster.ray_requests import NodeRequests
from biphase.cluster.ray_room import Room, refusal, rooms_asked
from biphase.cluster.ray_start import Options, RayStart
from biphase.cluster.ray_turns import Turn, first_without_room, held_of
from biphase.cluster.survivors import SERVED
from biphase.protos.errors import InvalidRequest, SetupError, one_line
from biphase.protos.process import Announcement
from biphase.protos.values import Role

KILL_WAIT_S = 5.0
RELEASE_S, RELEASE_POLL_S = 5.0, 0.1
ACTOR_CONCURRENCY = 8
"""Long polls of the supervisor, of the controller and of a controller's former life, a stop, and other ranks' looks for
rank 0, at once."""


class RayBackend:
    """Actors of one deployment. ``owner``: the supervisor's, which starts or joins the cluster and leaves it."""

    kill_patience_s: float | None = 2.0

    def __init__(self, deployment: Deployment, *, owner: bool) -> None:
        self._namespace = namespace_of(deployment.name)
        self._owner = owner
        self._joined = is_joined()
        self._groups: dict[tuple[str, int], RayGroup] = {}
        self._placing: set[asyncio.Task[None]] = set()
        self._call = RayCalls()
        self._book = NodeBook(self._call, deployment, self._namespace)
        self._book.on_look = self._tell_waiting
        self._placement = RayPlacement(self._namespace, self._book, self._groups, joined=self._joined)
        self._requests = NodeRequests(
            self._call, self._namespace, self._book, self._placement, self._share, joined=self._joined
        )
        self._start = RayStart(
            self._call, self._namespace, self._book, self._placement, self._share, self._create_actors
        )

    async def open(self) -> None:
        if self._owner:
            await self._call(partial(connect, self._namespace))
        if self._joined:
            await self._book.open(follow=not self._owner)

    @property
    def hosts_may_join(self) -> bool:
        return self._joined

    async def own_address(self) -> str:
        """Bound explicitly by what others of the cluster talk to; loopback where there is one host for good."""
        return str(await self._call(ray.util.get_node_ip_address)) if self._joined else "127.0.0.1"

    async def nodes(self) -> list[NodeView]:
        return self._placement.views()

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None:
        """First fit of the GPUs and CPUs that each stage asks for on those that are free, host by host.

        A share must lie in one GPU: ``divide`` has seen to that, over all GPUs of the cluster. What is free Ray tells by
        host and not by GPU, so where others hold fractions, what passes here may still have to wait for them.

        What was just killed gives back its own a little later: where the hosts are large enough, wait for it. Hosts that
        an autoscaler may still bring count as well.
        """
        growth = self._book.growth
        if self._owner:
            everything = [host.total for host in await self._call(hosts_now)]
            num_gpus = sum(room.gpus // WHOLE for room in everything)
            num_gpus = growth.num_gpus(num_gpus) if growth is not None else num_gpus
            await self._call(partial(self._keep_num_gpus, num_gpus))
            for spec in specs:
                self._check_node(spec)
        if self._owner and self._joined and growth is None and os.environ.get(WAIT_VARIABLE):
            return  # nobody knows how many hosts will come
        if not self._joined:
            await self._call(partial(self._parts, specs[0].deployment))
        parts = {spec.name: GpuPart(share=await self._call(partial(self._share, spec))) for spec in specs}
        groups = [[spec] for spec in specs] if emptied is not None else [list(specs)]
        turns = [
            Turn(
                name=group[0].name,
                stages=rooms_asked(group, parts),
                emptied=emptied.get(group[0].name, ()) if emptied is not None else (),
                shunned=self._placement.shunned(group[0]),
            )
            for group in groups
        ]
        workers = sum(not host.is_head for host in self._book.hosts)
        rooms = growth.rooms()[: max(0, growth.most_workers - workers)] if growth is not None else []
        to_come = {f"to come {number}": room for number, room in enumerate(rooms)}
        deadline_s = time.monotonic() + RELEASE_S
        while True:
            hosts, held = await self._call(hosts_now), await self._call(self._held)
            lack = first_without_room(turns, {host.node_id: host.free for host in hosts} | to_come, held)
            if lack is None:
                return
            largest = first_without_room([lack.turn], {host.node_id: host.total for host in hosts} | to_come, {})
            if largest is not None or time.monotonic() >= deadline_s:
                group = groups[turns.index(lack.turn)]
                why = refusal(group, lack.turn.stages, lack.free) if lack.free else "there is no host for it"
                who = f"{lack.turn.name}: " if emptied is not None else ""
                raise SetupError(f"{who}{why}{self._of_refused(group[0].deployment)}")
            await asyncio.sleep(RELEASE_POLL_S)

    def _held(self) -> dict[str, list[tuple[str, Room]]]:
        return held_of(placement_group_table().values(), self._namespace)

    async def check_nodes(self, deployment: Deployment) -> list[str]:
        if self._joined:
            await self._book.look(check=True)
            return await self._book.check_now(deployment)
        lack = await asyncio.to_thread(weights_lack, weights_of(deployment))
        if lack:
            raise SetupError(f"this host has no weights: {lack}")
        return []

    def check_for(self, deployments: Sequence[Deployment]) -> None:
        self._book.check_for(deployments)

    def _of_refused(self, deployment: Deployment | None = None) -> str:
        return "".join(f"; {reason}" for reason in self._book.refused(deployment).values())

    def _check_node(self, spec: ProcessSpec) -> None:
        """Raises SetupError for a router whose node cannot be told."""
        if spec.kind == "router" and self._joined:
            self._placement.address_of(spec.deployment.router_place(spec.name).node)

    async def start(self, spec: ProcessSpec) -> RayGroup:
        life = ActorName(name=spec.name, kind=spec.kind, incarnation=spec.incarnation)
        if not self._joined or (spec.kind != "prefill" and spec.kind != "decode"):
            return self._hold(life, await self._call(partial(self._create, spec)))
        coming: list[asyncio.Future[Any]] = [
            asyncio.get_running_loop().create_future() for _ in range(spec.plan.num_ranks)
        ]
        group = self._hold(life, coming)
        task = asyncio.create_task(self._start.run(spec, group, coming))
        self._placing.add(task)
        task.add_done_callback(self._placing.discard)
        return group

    async def _tell_waiting(self) -> None:
        """What those that have no process yet wait for. One question for all of them."""
        silent = [group for group in self._groups.values() if group.end is None and group.is_silent]
        if not silent:
            return
        there = await self._call(placement_group_table)
        states = {group["name"]: group["state"] for group in there.values() if group["state"] != "REMOVED"}
        shunned = self._book.shunned()
        rooms = ", ".join(str(host) for host in self._book.hosts if host.node_id not in shunned) or "none"
        for group in silent:
            state = states.get(group_name(self._namespace, group.name, group.incarnation))
            if state in ("PENDING", "RESCHEDULING"):
                group.say_waiting(f"waits for room on a node; there are {rooms}{self._of_refused()}")

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
                RayRank(actor, changed, self._call.within) if actor is not None else MissingRank("its actor is gone")
                for actor in actors
            ],
            on_gone=partial(self._call.within, partial(remove_groups, {placement})) if in_group else None,
        )
        self._groups[life.name, life.incarnation] = group
        return group

    def _parts(self, deployment: Deployment) -> dict[str, GpuPart]:
        num_gpus = int(internal_kv._internal_kv_get(self._num_gpus_key()) or 0)
        return divide(deployment, num_gpus, where="the Ray cluster")

    def _share(self, spec: ProcessSpec) -> float:
        if spec.kind != "prefill" and spec.kind != "decode":
            return 0.0
        asked = spec.deployment.plan(spec.kind).gpus
        if self._joined and asked is not None:  # whatever the cluster has now
            return 0.0 if spec.deployment.device == "cpu" else in_parts(asked) / WHOLE
        num_gpus = int(internal_kv._internal_kv_get(self._num_gpus_key()) or 0)
        return share_of(spec.deployment, spec.name, spec.kind, num_gpus, where="the Ray cluster")

    def _keep_num_gpus(self, num_gpus: int) -> None:
        """As many as there are at the start, for every life: a host that goes must change no instance's share."""
        internal_kv._internal_kv_put(self._num_gpus_key(), str(num_gpus).encode(), overwrite=True)

    def _num_gpus_key(self) -> bytes:
        return f"{self._namespace}:gpus".encode()

    def _create(self, spec: ProcessSpec) -> list[Any]:
        """All actors of a life and what they lie in. Ray starts them when their bundles are there."""
        try:
            options = self._placement.options(spec, self._share(spec))
        except SetupError:
            raise
        except Exception as error:
            raise SetupError(f"Ray has no place for {spec.name}: {one_line(error)}") from error
        return self._create_actors(spec, options)

    def _create_actors(self, spec: ProcessSpec, options: Options) -> list[Any]:
        """In the order of their ranks; ``options``: of a stage's."""
        share = self._share(spec)
        spec = replace(spec, gpus=share, host="" if self._joined else spec.host)
        key = secrets.token_hex(16) if spec.plan.num_ranks > 1 else ""
        try:
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
                    **options(spec.plan.stage_of(rank)),
                )
                .remote(replace(spec, rank=rank, rank_key=key).to_json())
                for rank in range(spec.plan.num_ranks)
            ]
        except Exception as error:
            raise SetupError(f"Ray does not start {spec.name}: {one_line(error)}") from error

    # -- nodes that an autoscaler may bring -------------------------------------------------------------------------

    @property
    def can_grow(self) -> bool:
        return self._requests.can_grow

    async def ask_node(self, spec: ProcessSpec) -> str:
        return await self._requests.ask(spec)

    async def withdraw_node(self, role: Role) -> None:
        await self._requests.withdraw(role)

    async def node_came(self, spec: ProcessSpec) -> bool | None:
        return await self._requests.came(spec)

    async def idle(self, spec: ProcessSpec) -> int:
        if self._joined:
            await self._book.look(check=not self._owner)
        return await self._requests.idle(spec)

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
        """Placement groups whose lives are over, or had not begun when their controller died.

        Requests for hosts go on over a controller's lives; whoever starts or ends the deployment withdraws them.
        """
        ours = {name for name in groups_there().values() if name.startswith(f"{self._namespace}/")}
        remove_groups({name for name in ours - kept if self._owner or not is_request(name)})

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

    def logs_of(self, node: str) -> LogSource:
        if not self._joined:
            return LocalLogs()
        if not node:
            raise InvalidRequest("it has no process yet")
        host = self._book.find(node)
        if host is None:
            there = ", ".join(host.address for host in self._book.hosts)
            raise InvalidRequest(f"it lies on {node}, which is gone; there are {there or 'no hosts'}")
        return LocalLogs() if host.node_id == ray.get_runtime_context().get_node_id() else RayLogs(self._call, host)

    async def save_state(self, text: str, key: str = STATE) -> None:
        kept = self._kept_key(key)
        try:
            await self._call.within(lambda: internal_kv._internal_kv_put(kept, text.encode(), overwrite=True))
        except ray.exceptions.RaySystemError as error:  # the cluster's head is away
            raise OSError(one_line(error)) from error

    async def load_state(self, key: str = STATE) -> str | None:
        kept = self._kept_key(key)
        found = await self._call(lambda: internal_kv._internal_kv_get(kept))
        return found.decode() if found is not None else None

    def _kept_key(self, key: str) -> bytes:
        return f"{self._namespace}:{key}".encode()

    async def close(self) -> None:
        for task in self._placing:
            task.cancel()
        await self._book.close()
        if self._owner and ray.is_initialized():
            handles = await self.adopt()
            for handle in handles:
                await self.kill(handle)
            waits = [asyncio.ensure_future(handle.ended()) for handle in handles]
            if waits:
                await asyncio.wait(waits, timeout=KILL_WAIT_S)
            for wait in waits:
                wait.cancel()
            await self._call(partial(self._forget, all_gone=all(handle.end is not None for handle in handles)))
        for own in self._groups.values():
            own.release()
        if self._owner:
            await self._call(ray.shutdown)
        self._call.close()

    def _forget(self, *, all_gone: bool) -> None:
        """An orderly end: the next serve begins anew. Incarnations stay known while one of them is not seen gone."""
        for key in (SERVED, STATE) if all_gone else (SERVED,):
            internal_kv._internal_kv_del(self._kept_key(key))


def _actor_of(spec: ProcessSpec, rank: int) -> ActorName:
    return ActorName(
        name=spec.name, kind=spec.kind, incarnation=spec.incarnation, rank=rank, num_ranks=spec.plan.num_ranks
    )
