"""What a dead controller costs those whose requests run: nothing, says the design.

    python bench/controller_dead.py [--pairs 5] [--requests 32] [--model smollm2] [--json FILE] [--check]

1 prefill and 1 decode instance as plain processes. The same requests, all at once, with the controller alive and dead in
turns: killed, with its supervisor stopped (SIGSTOP) so that nobody starts it again; then the supervisor goes on, and the next
life adopts what runs. Throughput is output tokens per second until the last request has ended.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator

import report
from local_cluster import LocalCluster, local_cluster

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.prompts import RandomPrompts
from biphase.client.bench.runner import Runner
from biphase.cluster.run_dir import started_ticks

DEVIATION = 0.05
INPUT_TOKENS, OUTPUT_TOKENS = 64, 48
BACK_WITHIN_S = 60.0


async def throughput(client: AsyncClient, count: int, seed: int) -> float:
    """Output tokens per second of ``count`` requests sent at once. SystemExit when one fails."""
    model = (await client.model_info()).model
    prompts = RandomPrompts(vocab_size=model.vocab_size, max_model_len=model.max_model_len, seed=seed)
    due = [
        Arrival(index=index, at_s=0.0, phase=0, input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)
        for index in range(count)
    ]
    found = await Runner([client], prompts, timeout_s=300.0).run(due)
    bad = [one for one in found if not one.done]
    if bad:
        raise SystemExit(f"a request failed: {bad[0].kind}: {bad[0].detail}")
    return sum(len(one.token_at_s) for one in found) / max(one.ended_s for one in found)


def pids(cluster: LocalCluster) -> tuple[int, int]:
    """(supervisor, controller); 0 for one that is not there."""
    record = cluster.run_dir.record()
    assert record is not None
    return record.pid, next((line.pid for line in record.processes if line.name == "controller"), 0)


@contextlib.asynccontextmanager
async def controller_dead(cluster: LocalCluster) -> AsyncIterator[None]:
    """For as long as its supervisor is stopped; at the end the next life is up and has adopted what runs."""
    supervisor, controller = pids(cluster)
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(controller, signal.SIGKILL)
        await asyncio.to_thread(_wait_gone, controller)
        if await cluster.status() is not None:
            raise SystemExit("the controller still answers")
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)
    deadline = time.monotonic() + BACK_WITHIN_S
    while pids(cluster)[1] == controller or (status := await cluster.status()) is None or status.state != "ready":
        if time.monotonic() > deadline:
            raise SystemExit(f"the controller is not back after {BACK_WITHIN_S:g} s")
        await asyncio.sleep(0.1)


def _wait_gone(pid: int) -> None:
    while started_ticks(pid) is not None:
        time.sleep(0.01)


async def measure(arguments: argparse.Namespace) -> int:
    found = report.Report("controller_dead", ("pair", "alive tok/s", "dead tok/s", "dead of alive"))
    plan = {"replicas": 1, "threads": 1, "kv_memory": "256MiB"}
    deploy = {"model": arguments.model, "backend": "process", "max_model_len": 1024, "prefill": plan, "decode": plan}
    alive, dead = [], []
    async with local_cluster(deploy, {}) as cluster, AsyncClient(cluster.address) as client:
        await throughput(client, arguments.requests, 0)  # connections and pages are there
        for pair in range(1, arguments.pairs + 1):
            for is_dead in (False, True) if pair % 2 else (True, False):
                if is_dead:
                    async with controller_dead(cluster):
                        dead.append(await throughput(client, arguments.requests, pair))
                else:
                    alive.append(await throughput(client, arguments.requests, pair))
            found.row(pair, alive[-1], dead[-1], dead[-1] / alive[-1])
            print(f"pair {pair}: dead {dead[-1] / alive[-1]:.3f} of alive", file=sys.stderr, flush=True)
    ratio = statistics.median(dead) / statistics.median(alive)
    found.row("median", statistics.median(alive), statistics.median(dead), ratio)
    found.goal("dead_of_alive_deviation", abs(1 - ratio), DEVIATION)
    return found.finish(arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="at once")
    parser.add_argument("--model", default="smollm2")
    report.add_arguments(parser)
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    report.run(main)
