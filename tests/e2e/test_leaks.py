"""Nothing leaks: hundreds of requests, a third of them cancelled in every phase, and every counter is back at once.

The phases are told by the processes' own counters of where a cancel found a request. Two routers share the decode
instance, as routers do: neither knows what the other has promised, so its queue fills too.
"""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from support.deployment import Deployment, deployed

from biphase.client import AsyncClient
from biphase.client.async_client import AsyncGeneration
from biphase.kvtransfer.tcp.source import MOST_IDLE
from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.errors import Cancelled

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_FINISHED = 200
NUM_IN_EACH_PHASE = 10
MOST_REQUESTS = 1500
BACK_WITHIN_S = 1.0
"""After the last end, and no longer: what the issue of a leak is measured by."""

PHASES = {
    "queue": ("router", "cancelled_in_queue"),
    "prefill": ("router", "cancelled_in_prefill"),
    "between Started and FirstToken": ("router", "cancelled_in_started"),
    "decode queue": ("decode-0", "cancelled_queued"),
    "mid-pull": ("decode-0", "cancelled_pulling"),
    "first step": ("decode-0", "cancelled_first_step"),
    "decode": ("decode-0", "cancelled_decoding"),
}

WORKER_LIVE = ("blocks_used", "legs", "sequences", "queued", "queued_tokens", "running")
TRANSFER_LIVE = ("tickets", "open_pulls", "running_sends")
ROUTER_LIVE = ("live_requests", "queued_requests", "queued_tokens", "legs")
OF_THE_PROCESS = ("tasks", "python_threads", "open_fds")


class Probe:
    """Reads every process's own counters over connections that stay open, so that they do not change what is read."""

    def __init__(self, deployment: Deployment, routers: dict[str, AsyncClient]) -> None:
        self.routers = routers
        self.channels = {
            running.name: grpc.aio.insecure_channel(running.address)
            for running in [*deployment.prefill, *deployment.decode]
        }

    async def read(self) -> dict[str, dict[str, int]]:
        found = {name: dict((await client.server_info()).counters) for name, client in self.routers.items()}
        for name, channel in self.channels.items():
            stats = await worker_pb2_grpc.WorkerStub(channel).GetStats(worker_pb2.StatsRequest())
            found[name] = dict(stats.counters)
        return found

    async def until(self, worker: str, counter: str, at_least: int = 1) -> None:
        stub = worker_pb2_grpc.WorkerStub(self.channels[worker])
        while (await stub.GetStats(worker_pb2.StatsRequest())).counters[counter] < at_least:
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()


def held(counters: dict[str, dict[str, int]]) -> dict[str, int]:
    """What is not back: live entries of every process that are not zero."""
    names = {name: ROUTER_LIVE if name.startswith("router") else WORKER_LIVE for name in counters}
    names["prefill-0"] += TRANSFER_LIVE
    names["decode-0"] += ("open_pulls",)
    return {f"{p}.{key}": counters[p][key] for p, keys in names.items() for key in keys if counters[p][key]}


def process_counts(counters: dict[str, dict[str, int]]) -> dict[str, int]:
    return {f"{p}.{k}": v for p, found in counters.items() for k, v in found.items() if k in OF_THE_PROCESS}


def grown(before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> dict[str, int]:
    """Tasks, threads and files that were not there before. A few connections to a source are kept for the next pulls,
    with a task each at its end; how many there are depends on how many pulls there were at a time."""
    then, found = process_counts(before), {}
    for name, count in process_counts(now).items():
        kept = 0 if name.startswith("router") or name.endswith("python_threads") else MOST_IDLE
        if count > then[name] + kept:
            found[name] = count - then[name]
    return found


@dataclass
class Seen:
    """How many tokens of a stream have come."""

    tokens: int = 0


When = Callable[[Seen], Awaitable[None]]


class Load:
    """Sends requests of random lengths; counts how they end."""

    def __init__(self, client: AsyncClient, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.ends: Counter[str] = Counter()

    def send(self, prompt_tokens: int, max_tokens: int) -> AsyncGeneration:
        prompt = [self.random.randrange(100, 40000) for _ in range(prompt_tokens)]
        return self.client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    async def finish(self, prompt_tokens: int, max_tokens: int) -> None:
        stream = self.send(prompt_tokens, max_tokens)
        async for _ in stream:
            pass
        assert stream.result.usage.output_tokens == max_tokens
        self.ends["finished"] += 1

    async def cut(self, prompt_tokens: int, max_tokens: int, when: When) -> None:
        """Send one, and close it when ``when`` says so, unless it has ended before."""
        stream, seen = self.send(prompt_tokens, max_tokens), Seen()

        async def close() -> None:
            await when(seen)
            stream.close()

        closing = asyncio.create_task(close())
        try:
            async for delta in stream:
                seen.tokens += len(delta.token_ids)
            self.ends["finished"] += 1
        except Cancelled:
            self.ends["cancelled"] += 1
        finally:
            closing.cancel()
            await asyncio.wait([closing])


def after(seconds: float) -> When:
    async def wait(_: Seen) -> None:
        await asyncio.sleep(seconds)

    return wait


def after_tokens(count: int, then_s: float = 0.0) -> When:
    async def wait(seen: Seen) -> None:
        while seen.tokens < count:
            await asyncio.sleep(0.002)
        await asyncio.sleep(then_s)

    return wait


def once(probe: Probe, worker: str, counter: str, then_s: float) -> When:
    """When a worker says that it has such, of whichever request."""

    async def wait(_: Seen) -> None:
        await probe.until(worker, counter)
        await asyncio.sleep(then_s)

    return wait


async def one_round(phase: str, probe: Probe, load: Load, other: Load) -> None:
    """Requests that are likely to be cut in ``phase``. Where the cut found them, the processes' counters tell."""
    pick = load.random.uniform
    if phase in ("queue", "prefill"):  # more prompts than the prefill instance takes at once
        await asyncio.gather(*(load.cut(200, 4, after(pick(0.15, 0.3))) for _ in range(14)))
    elif phase == "between Started and FirstToken":
        await asyncio.gather(*(load.cut(250, 4, after(pick(0.1, 0.6))) for _ in range(4)))
    elif phase == "decode queue":  # half its sequences run; each router promises the other half at the same time
        tried = asyncio.Event()

        async def until_tried(_: Seen) -> None:
            await tried.wait()

        filling = [asyncio.create_task(other.cut(20, 400, until_tried)) for _ in range(4)]
        await probe.until("decode-0", "running", 4)
        both = [load, other] * 4
        await asyncio.gather(
            *(router.cut(20, 60, once(probe, "decode-0", "queued", pick(0.0, 0.05))) for router in both)
        )
        tried.set()
        await asyncio.gather(*filling)
    elif phase == "mid-pull":
        began_s = time.monotonic()
        await load.finish(600, 1)
        alone_s = time.monotonic() - began_s  # with the load beside, as fast as this machine is now
        await asyncio.gather(*(load.cut(600, 4, after(pick(0.2, 1.0) * alone_s * n)) for n in (1, 2)))
    elif phase == "first step":
        await asyncio.gather(*(load.cut(30, 30, after_tokens(1, pick(0.005, 0.05))) for _ in range(4)))
    else:
        await asyncio.gather(*(load.cut(30, 60, after_tokens(5)) for _ in range(5)))


async def test_nothing_leaks_when_a_third_is_cancelled_in_every_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--block-size", "16", "--max-model-len", "1024", "--num-kv-blocks", "160"]
    with deployed(
        tmp_path,
        prefill_args=[*small, "--max-num-batched-tokens", "128", "--max-queued-tokens", "1024"],
        decode_args=[*small, "--max-num-seqs", "8"],
    ) as deployment:
        members = ["--prefill", deployment.prefill[0].address, "--decode", deployment.decode[0].address]
        command = [sys.executable, "-m", "biphase.router", "--model", "smollm2", "--host", "127.0.0.1", "--port", "0"]
        second = deployment.spawn("router-1", [*command, *members])
        try:
            second.wait_ready()
            async with AsyncClient(deployment.address) as client, AsyncClient(second.address) as other_client:
                probe = Probe(deployment, {"router": client, "router-1": other_client})
                load, other = Load(client, 1), Load(other_client, 2)
                # what is opened once (connections between instances, thread pools) is opened before counting
                await asyncio.gather(*(load.finish(40, 8) for _ in range(8)), *(other.finish(40, 8) for _ in range(8)))
                await load.cut(40, 60, after_tokens(3))
                await asyncio.sleep(BACK_WITHIN_S)
                before = await probe.read()
                assert held(before) == {}

                async def finishing() -> None:
                    while load.ends["finished"] + other.ends["finished"] < NUM_FINISHED:
                        lengths = [(load.random.randrange(1, 90), load.random.randrange(1, 16)) for _ in range(10)]
                        await asyncio.gather(*(load.finish(*length) for length in lengths))

                def counts(now: dict[str, dict[str, int]]) -> dict[str, int]:
                    return {p: now[at].get(key, 0) - before[at].get(key, 0) for p, (at, key) in PHASES.items()}

                beside = asyncio.create_task(finishing())
                while True:
                    missing = [p for p, n in counts(await probe.read()).items() if n < NUM_IN_EACH_PHASE]
                    if not missing:
                        break
                    assert sum(load.ends.values()) + sum(other.ends.values()) < MOST_REQUESTS, missing
                    await one_round(missing[0], probe, load, other)
                await beside
                ended_at = time.monotonic()
                while True:
                    now = await probe.read()
                    if not held(now) and not grown(before, now):
                        break
                    took_s = time.monotonic() - ended_at
                    assert took_s < BACK_WITHIN_S, (held(now), grown(before, now))
                    await asyncio.sleep(0.02)
                back_s = time.monotonic() - ended_at
                await probe.close()
        finally:
            second.stop()
    ends = load.ends + other.ends
    with capsys.disabled():
        print(f"\n{dict(ends)}; cut in each phase: {counts(now)}; all back after {back_s * 1000:.0f} ms")
    assert ends["finished"] >= NUM_FINISHED and ends["cancelled"] >= 100
    assert now["prefill-0"]["leases_expired"] == 0
    for name in ("router", "router-1"):
        assert not [key for key in now[name] if key.startswith("failed_")], now[name]
