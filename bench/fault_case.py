"""One fault under load, and what it did: to the requests, to the tokens, to what the instances hold, and for how long.

Used by bench/recovery.py, which says which faults, and by bench/chaos.py, which draws them.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from idle_counters import wait_idle
from netns_cluster import CONTROLLER, NetnsCluster

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.measured import Measured
from biphase.client.bench.prompts import Prompts
from biphase.client.bench.runner import Runner
from biphase.protos.errors import BiphaseError

Kind = Literal["kill", "stop", "partition", "pair"]
KINDS_OF: tuple[Kind, ...] = ("kill", "stop", "partition", "pair")
HEAL_AFTER_S = 10.0
SEEN_WITHIN_S = 15.0
STRONG_WITHIN_S = 90.0
POLL_S = 0.01
STREAMS_ON_VICTIM = 4
TIMEOUT_S = 180.0
"""Of each request: far above what any fault may cost, so that one that hangs is a lost one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``victim`` is the name of a process; of a ``pair`` the decode instance, cut off from ``other``."""

    kind: Kind
    victim: str
    other: str = ""

    @property
    def role(self) -> str:
        return self.victim.partition("-")[0]

    @property
    def label(self) -> str:
        if self.kind == "pair":
            return "partition prefill-decode"
        return {"kill": "kill -9", "stop": "SIGSTOP", "partition": "partition"}[self.kind] + f" {self.role}"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Seconds count from the fault; NaN where there is nothing to measure or it was not seen in time."""

    fault: Fault
    at_s: float = math.nan
    """On the load's own clock."""
    seen_s: float = math.nan
    """When every router alive had the instance as not ready; of a router, when its last stream had ended at the client."""
    strong_s: float = math.nan
    """When everything was ready again."""
    stopped_s: float = math.nan
    """Of a router: when the instances held no more of its work."""
    measured: list[Measured] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    """Counters that were not back after the last end."""
    address: str = ""
    """Of the faulted router."""

    @property
    def excused(self) -> list[Measured]:
        """Failed as they may: at the faulted router, with UNAVAILABLE."""
        if self.fault.role != "router":
            return []
        return [one for one in self.measured if one.kind == "UNAVAILABLE" and one.address == self.address]

    @property
    def lost(self) -> list[Measured]:
        excused = {one.index for one in self.excused}
        return [one for one in self.measured if not one.done and one.index not in excused]

    @property
    def wrong(self) -> int:
        return sum(one.wrong for one in self.measured)

    @property
    def replays(self) -> int:
        return sum(one.replays for one in self.measured)

    @property
    def displaced(self) -> list[Measured]:
        """Done requests that were running when the fault came and went on elsewhere."""
        return [one for one in self.measured if one.done and one.replays and one.sent_s < self.at_s < one.ended_s]

    @property
    def displaced_tokens(self) -> int:
        """Prompts and what was emitted: what has to be prefilled again."""
        return sum(one.input_tokens + sum(at_s <= self.at_s for at_s in one.token_at_s) for one in self.displaced)

    @property
    def gap_s(self) -> float:
        """The longest silence of a displaced stream that ended after the fault."""
        gaps = [
            later - max(earlier, one.sent_s)
            for one in self.displaced
            for earlier, later in zip((one.sent_s, *one.token_at_s), one.token_at_s, strict=False)
            if later > self.at_s
        ]
        return max(gaps, default=math.nan)


class Load:
    """Requests through every router, and the routers' own word on the instances."""

    def __init__(self, cluster: NetnsCluster, clients: Sequence[AsyncClient], prompts: Prompts) -> None:
        self.cluster, self.clients, self._prompts = cluster, list(clients), prompts

    def runner(self, timeout_s: float = TIMEOUT_S, through: AsyncClient | None = None) -> Runner:
        """To each router in turn by a client of its own; or ``through`` one that knows all of them."""
        return Runner([through] if through else self.clients, self._prompts, timeout_s=timeout_s)

    async def states(self, client: AsyncClient) -> dict[str, tuple[int, str, int]] | None:
        """(incarnation, state, running) of every instance as a router sees it; None when it does not answer."""
        try:
            info = await client.server_info(timeout_s=1.0)
        except BiphaseError:
            return None
        return {one.name: (one.incarnation, one.state, one.running) for one in info.instances}

    async def strong(self, instances: Mapping[str, int]) -> bool:
        """Whether every router has so many ``instances`` of each role as ready, and the controller calls all ready."""
        for client in self.clients:
            try:
                views = (await client.server_info(timeout_s=1.0)).instances
            except BiphaseError:
                return False
            ready = Counter(view.role for view in views if view.state == "ready")
            if any(ready[role] != count for role, count in instances.items()):  # type: ignore[index]
                return False
        status = await self.cluster.status()
        return status is not None and status.state == "ready" and bool(status.processes)


@contextlib.asynccontextmanager
async def load_of(cluster: NetnsCluster, prompts: Prompts) -> AsyncIterator[Load]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(address)) for address in cluster.addresses]
        yield Load(cluster, clients, prompts)


async def run_case(load: Load, fault: Fault, arrivals: Sequence[Arrival], instances: Mapping[str, int]) -> Outcome:
    """Start the load, wait until the victim is at work, hit it, heal it, wait for full strength and for every end."""
    outcome, runner = Outcome(fault=fault), load.runner()
    running = asyncio.create_task(runner.run(arrivals))
    try:
        await _at_work(load, fault, runner)
        life = load.cluster.lives()[fault.victim][1]
        hit_at = time.monotonic()
        outcome.at_s = runner.now_s()
        heal = inject(load.cluster, fault)
        if fault.role == "router":
            outcome.address = load.cluster.addresses[int(fault.victim.partition("-")[2])]
            doomed = [index for index, live in runner.live.items() if live.address == outcome.address]
            seen = asyncio.create_task(_streams_ended(runner, doomed, hit_at))
            stopped = asyncio.create_task(_work_stopped(load, fault, hit_at))
        else:
            seen = asyncio.create_task(_seen(load, fault, life, hit_at))
            stopped = None
        if fault.kind != "kill":
            await asyncio.sleep(HEAL_AFTER_S - (time.monotonic() - hit_at))
        heal()
        outcome.seen_s = await seen
        outcome.stopped_s = await stopped if stopped else math.nan
        outcome.strong_s = await _strong_again(load, instances, hit_at)
    finally:
        runner.stop()
    outcome.measured = list(await running)
    outcome.left = await wait_idle(load.cluster, within_s=5.0)
    return outcome


def inject(cluster: NetnsCluster, fault: Fault):  # type: ignore[no-untyped-def]
    """Do it; returns what heals it, which for a kill does nothing."""
    match fault.kind:
        case "kill":
            cluster.kill(fault.victim)
            return lambda: None
        case "stop":
            pid = cluster.pause(fault.victim)
            return lambda: cluster.resume(pid)
        case "partition":
            host = cluster.cut(fault.victim)
            return lambda: cluster.heal(host)
        case "pair":
            hosts = cluster.cut_pair(fault.victim, fault.other)
            return lambda: cluster.heal_pair(hosts)


async def _at_work(load: Load, fault: Fault, runner: Runner) -> None:
    """A decode instance has its streams, others have seen some of the load; or a while has passed."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        busy = sum(len(live.tokens) >= 3 for live in runner.live.values())
        if fault.role == "decode":
            states = [await load.states(client) for client in load.clients]
            on_victim = max((found[fault.victim][2] for found in states if found and fault.victim in found), default=0)
            if on_victim >= STREAMS_ON_VICTIM and busy >= STREAMS_ON_VICTIM:
                return
        elif busy >= STREAMS_ON_VICTIM:
            return
        await asyncio.sleep(0.05)


async def _seen(load: Load, fault: Fault, life: int, hit_at: float) -> float:
    """Until every router has the victim's ``life`` as not ready. What the routers cannot see by themselves is NaN."""
    if fault.victim == CONTROLLER or fault.kind == "pair":
        return math.nan

    async def one(client: AsyncClient) -> float:
        while time.monotonic() - hit_at < SEEN_WITHIN_S:
            states = await load.states(client)
            if states is not None:
                incarnation, state, _ = states.get(fault.victim, (0, "absent", 0))
                if state != "ready" or incarnation > life:
                    return time.monotonic() - hit_at
            await asyncio.sleep(POLL_S)
        return math.nan

    return max(await asyncio.gather(*(one(client) for client in load.clients)))


async def _streams_ended(runner: Runner, doomed: Sequence[int], hit_at: float) -> float:
    while any(index in runner.live for index in doomed):
        if time.monotonic() - hit_at > SEEN_WITHIN_S:
            return math.nan
        await asyncio.sleep(POLL_S)
    return time.monotonic() - hit_at if doomed else math.nan


async def _work_stopped(load: Load, fault: Fault, hit_at: float) -> float:
    """Until the instances hold no more legs than the other routers have."""
    others = [client for index, client in enumerate(load.clients) if f"router-{index}" != fault.victim]
    while time.monotonic() - hit_at < SEEN_WITHIN_S:
        held = sum(counters.get("legs", 0) for counters in (await load.cluster.worker_counters()).values())
        theirs = 0
        for client in others:
            with contextlib.suppress(BiphaseError):
                theirs += (await client.server_info(timeout_s=1.0)).counters.get("legs", 0)
        if held <= theirs:
            return time.monotonic() - hit_at
        await asyncio.sleep(0.05)
    return math.nan


async def _strong_again(load: Load, instances: Mapping[str, int], hit_at: float) -> float:
    while time.monotonic() - hit_at < STRONG_WITHIN_S:
        if await load.strong(instances):
            return time.monotonic() - hit_at
        await asyncio.sleep(0.1)
    return math.nan
