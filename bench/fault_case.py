"""One fault under load: when to hit, what heals it, and what is looked at until all is back.

Used by bench/recovery.py, which says which faults, and by bench/chaos.py, which draws them; what comes out of it is a
``fault_outcome.Outcome``.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from fault_outcome import Fault, Outcome, View, seen_unix_s
from fault_work import POLL_S, at_work, prompt_burst
from idle_counters import counters_at, wait_idle
from load_clock import shifted
from netns_cluster import NetnsCluster

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.prompts import Prompts
from biphase.client.bench.runner import Runner
from biphase.protos.errors import BiphaseError

HEAL_AFTER_S = 10.0
SEEN_WITHIN_S = 15.0
STRONG_WITHIN_S = 90.0
SERVES_WITHIN_S = 15.0
FORMER_WITHIN_S = 10.0
ANSWERS_AFTER_S = 0.2
"""A word of a router that was asked sooner after the fault may be from before it."""
INPUT_TOKENS = 64
"""Of prompts, as near as the recorded ones come."""
TIMEOUT_S = 180.0
"""Of each request: far above what any fault may cost, so that one that hangs is a lost one."""


class Load:
    """Requests through every router, and the routers' own word on the instances."""

    def __init__(self, cluster: NetnsCluster, clients: Sequence[AsyncClient], prompts: Prompts) -> None:
        self.cluster, self.clients, self._prompts = cluster, list(clients), prompts

    def runner(self, timeout_s: float = TIMEOUT_S, through: AsyncClient | None = None) -> Runner:
        """To each router in turn by a client of its own; or ``through`` one that knows all of them."""
        return Runner([through] if through else self.clients, self._prompts, timeout_s=timeout_s)

    async def views(self, client: AsyncClient) -> dict[str, View] | None:
        """Every instance as a router sees it; None when it does not answer."""
        try:
            info = await client.server_info(timeout_s=1.0)
        except BiphaseError:
            return None
        return {
            one.name: View(incarnation=one.incarnation, state=one.state, since_unix_s=one.since_unix_s, legs=one.legs)
            for one in info.instances
        }

    async def legs_on(self, name: str) -> int | None:
        """Requests aboard an instance, of all routers; None unless every router has it as ready."""
        views = [(await self.views(client) or {}).get(name) for client in self.clients]
        found = [view.legs for view in views if view is not None and view.state == "ready"]
        return sum(found) if len(found) == len(self.clients) else None

    async def streams_on(self, name: str) -> int:
        """Requests that an instance decodes now, by its own word: their KV is there."""
        counters = (await self.cluster.worker_counters()).get(name, {})
        return counters.get("running", 0) - counters.get("open_pulls", 0)

    async def open_pulls(self, name: str) -> int:
        """What an instance pulls from others now, by its own word."""
        return (await self.cluster.worker_counters()).get(name, {}).get("open_pulls", 0)

    async def failed_handoffs(self) -> int:
        """As the routers count them that answer."""
        found = 0
        for client in self.clients:
            with contextlib.suppress(BiphaseError):
                found += (await client.server_info(timeout_s=1.0)).counters.get("replays_handoff_failed", 0)
        return found

    def client_of(self, address: str) -> AsyncClient:
        return next(client for client in self.clients if client.address == address)

    async def serves(self, address: str) -> bool:
        """Whether a request through that router alone is done, with the right tokens."""
        arrival = Arrival(index=0, at_s=0.0, phase=0, input_tokens=INPUT_TOKENS, output_tokens=4)
        (one,) = await self.runner(SERVES_WITHIN_S, through=self.client_of(address)).run([arrival])
        return one.done and not one.wrong

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
    outcome, runner, cluster = Outcome(fault=fault), load.runner(), load.cluster
    if fault.role == "router":
        outcome.address = cluster.addresses[int(fault.victim.partition("-")[2])]
    prompts = load.runner()
    running = [asyncio.create_task(runner.run(arrivals))]

    def send_prompts() -> None:
        running.append(asyncio.create_task(prompts.run(prompt_burst(INPUT_TOKENS))))

    try:
        before = cluster.lives()
        outcome.life = f"{fault.victim}#{before[fault.victim][1]}"
        failed_before = await load.failed_handoffs()
        outcome.on_victim = await at_work(load, fault, runner.live, outcome.address, send_prompts)
        hit_at, hit_unix_s, outcome.at_s = time.monotonic(), time.time(), runner.now_s()
        outcome.doomed = [index for index, live in runner.live.items() if live.address == outcome.address]
        heal = inject(cluster, fault)
        if fault.kind == "pair":
            seen = asyncio.create_task(_pair_seen(load, failed_before, hit_at))
        else:
            seen = asyncio.create_task(_seen(load, fault, hit_unix_s))
        replaced = asyncio.create_task(_strong_after(load, instances, hit_at, seen))
        stopped = asyncio.create_task(_work_stopped(load, fault, hit_at))
        over = asyncio.create_task(_answers_again(load, outcome, runner, hit_at))
        if fault.kind != "kill":
            await asyncio.sleep(HEAL_AFTER_S - (time.monotonic() - hit_at))
        heal()
        former = asyncio.create_task(_former_lives(cluster, time.monotonic()))
        outcome.detected_s, outcome.stopped_s = await seen, await stopped
        healed_s = await _strong_again(load, instances, hit_at)
        replaced_s = await replaced
        by_itself = fault.role in ("prefill", "decode") and fault.kind != "pair"
        outcome.strong_s = replaced_s if by_itself and not math.isnan(healed_s + replaced_s) else healed_s
        runner.stop()
        outcome.over_s = await over
        if outcome.address and not math.isnan(healed_s):
            outcome.served_after = await load.serves(outcome.address)
        if fault.kind == "pair":
            outcome.failed_handoffs = await load.failed_handoffs() - failed_before
        outcome.former = sorted({*await former, *cluster.former_lives()})
        spared = () if fault.kind == "pair" else (fault.victim,)
        after = cluster.lives()
        outcome.restarted = [name for name in before if name not in spared and after.get(name) != before[name]]
    finally:
        runner.stop()
        await asyncio.gather(*running)
    outcome.measured = [*runner.measured, *shifted(prompts.measured, prompts.began_at_s - runner.began_at_s)]
    outcome.left = await wait_idle(cluster, within_s=5.0)
    return outcome


def inject(cluster: NetnsCluster, fault: Fault) -> Callable[[], None]:
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


async def _seen(load: Load, fault: Fault, hit_unix_s: float) -> float:
    """Seconds until every router had the victim as not ready, by their own clocks; asking has no part in it. NaN for what
    the routers cannot see by themselves."""
    if fault.role not in ("prefill", "decode"):
        return math.nan

    async def one(client: AsyncClient) -> float:
        while time.time() - hit_unix_s < SEEN_WITHIN_S:
            asked_unix_s = time.time()
            views = await load.views(client)
            if views is not None:
                seen = seen_unix_s(views.get(fault.victim), hit_unix_s, asked_unix_s)
                if seen is not None:
                    return seen - hit_unix_s
            await asyncio.sleep(POLL_S)
        return math.nan

    found = await asyncio.gather(*(one(client) for client in load.clients))
    return math.nan if any(map(math.isnan, found)) else max(found)


async def _pair_seen(load: Load, failed_before: int, hit_at: float) -> float:
    """Seconds until a router knew of the first handoff that failed; NaN when none has."""
    while time.monotonic() - hit_at < SEEN_WITHIN_S:
        if await load.failed_handoffs() > failed_before:
            return time.monotonic() - hit_at
        await asyncio.sleep(POLL_S)
    return math.nan


async def _answers_again(load: Load, outcome: Outcome, runner: Runner, hit_at: float) -> float:
    """When the faulted router answered again, on the load's clock, by the connection that its requests take."""
    if not outcome.address:
        return math.inf
    await asyncio.sleep(ANSWERS_AFTER_S)
    while time.monotonic() - hit_at < STRONG_WITHIN_S:
        if await load.views(load.client_of(outcome.address)) is not None:
            return runner.now_s()
        await asyncio.sleep(POLL_S)
    return math.inf


async def _work_stopped(load: Load, fault: Fault, hit_at: float) -> float:
    """Of a router: seconds until the instances, all of which answer, hold no more legs than the other routers have."""
    if fault.role != "router":
        return math.nan
    others = [client for index, client in enumerate(load.clients) if f"router-{index}" != fault.victim]

    async def theirs() -> int:
        return sum([(await client.server_info(timeout_s=1.0)).counters["legs"] for client in others])

    instances: dict[str, str] = {}
    while time.monotonic() - hit_at < SEEN_WITHIN_S:
        instances = instances or await load.cluster.worker_addresses()
        with contextlib.suppress(BiphaseError):
            before = await theirs()
            held = [(await counters_at(address)).get("legs", math.inf) for address in instances.values()]
            if held and sum(held) <= min(before, await theirs()):
                return time.monotonic() - hit_at
        await asyncio.sleep(0.05)
    return math.nan


async def _former_lives(cluster: NetnsCluster, healed_at: float) -> list[str]:
    """Those that a newer life has replaced and that have not ended in time, counted from the heal."""
    while time.monotonic() - healed_at < FORMER_WITHIN_S:
        await asyncio.sleep(0.1)
        if not cluster.former_lives():
            return []
    return cluster.former_lives()


async def _strong_after(load: Load, instances: Mapping[str, int], hit_at: float, seen: "asyncio.Task[float]") -> float:
    """An instance may be replaced before it is healed; what was strong before the fault was seen says nothing."""
    return math.nan if math.isnan(await seen) else await _strong_again(load, instances, hit_at)


async def _strong_again(load: Load, instances: Mapping[str, int], hit_at: float) -> float:
    while time.monotonic() - hit_at < STRONG_WITHIN_S:
        if await load.strong(instances):
            return time.monotonic() - hit_at
        await asyncio.sleep(0.1)
    return math.nan
