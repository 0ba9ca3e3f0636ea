"""Seeded load, and a random fault every ten seconds: what is left of the service, and whether all comes back.

    python bench/chaos.py [--minutes 2] [--seed 1] [--every 10] [--heal 3] [--tokens FILE] [--model smollm2] [--json FILE] [--check]

1 prefill and 2 decode instances and 2 routers on hosts of their own (``netns_cluster.py``). The load is half of what the
deployment does without a fault, measured first. Faults are drawn by the seed: kill -9, SIGSTOP, partition, and a partition of
one pair, of whatever lives at that moment, healed after --heal seconds. One client knows both routers: what has no token yet
when its router goes is sent to the other.

Goals: at least 80 % of the offered requests done and token-exact, the rest refused with a clear status; full strength within
30 s of the last fault; every counter back to zero.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import report
from fault_case import KINDS_OF, Fault, Load, inject, load_of
from idle_counters import wait_idle
from netns_cluster import CONTROLLER, NetnsCluster, netns_cluster
from recovery import INSTANCES, baseline, deploy_of, recording_of

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Phase, arrivals
from biphase.client.bench.lengths import fixed, parse_lengths
from biphase.client.bench.phases_file import read_lengths
from biphase.client.bench.prompts import RecordedPrompts
from biphase.client.bench.tokens_file import Recording
from biphase.protos.errors import SetupError, one_line

DONE_SHARE, STRONG_WITHIN_S = 0.8, 30.0
CLEAR = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED")
"""What a request may end with that is not done: the client knows what to think of it."""
OUTPUT_LEN = "uniform:16:64"


def drawn_fault(draws: random.Random, cluster: NetnsCluster) -> Fault:
    """Of whatever lives now."""
    lives = sorted(cluster.lives())
    kind = draws.choice(KINDS_OF)
    if kind == "pair":
        prefill = [name for name in lives if name.startswith("prefill")]
        decode = [name for name in lives if name.startswith("decode")]
        if prefill and decode:
            return Fault(kind="pair", victim=draws.choice(decode), other=draws.choice(prefill))
        kind = "kill"
    victims = [name for name in lives if name != CONTROLLER or kind != "partition"] or [CONTROLLER]
    return Fault(kind=kind, victim=draws.choice(victims))


async def fault_loop(load: Load, arguments: argparse.Namespace, until_s: float, found: report.Report) -> float:
    """Until ``until_s`` (monotonic); returns when the last fault was healed."""
    draws = random.Random(arguments.seed)
    healed_at = time.monotonic()
    while time.monotonic() + arguments.every <= until_s:
        await asyncio.sleep(arguments.every)
        fault = drawn_fault(draws, load.cluster)
        try:
            heal = inject(load.cluster, fault)
        except (KeyError, RuntimeError) as error:  # it has died meanwhile
            print(f"{fault.label}: {one_line(error)}", file=sys.stderr, flush=True)
            continue
        print(f"fault: {fault.label} ({fault.victim})", file=sys.stderr, flush=True)
        await asyncio.sleep(arguments.heal)
        heal()
        healed_at = time.monotonic()
        found.extra.setdefault("faults", []).append([fault.kind, fault.victim, fault.other])
    return healed_at


async def strong_after(load: Load, since: float) -> float:
    while time.monotonic() - since < 4 * STRONG_WITHIN_S:
        if await load.strong(INSTANCES):
            return time.monotonic() - since
        await asyncio.sleep(0.1)
    return math.inf


async def measure(arguments: argparse.Namespace, recording: Recording) -> int:
    found = report.Report("chaos", ("outcome", "requests", "share", "example"))
    prompts = RecordedPrompts(recording.usable, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        deploy = deploy_of(arguments)
        async with netns_cluster(Path(folder), deploy, num_instances=sum(INSTANCES.values()), spares=4) as cluster:
            async with load_of(cluster, prompts) as load:
                capacity, _ = await baseline(load, arguments.seed, parse_lengths(OUTPUT_LEN, "output", read_lengths))
                seconds = 60.0 * arguments.minutes
                phase = Phase(
                    name="chaos",
                    seconds=seconds,
                    rate=capacity / 2,
                    rate_end=capacity / 2,
                    burstiness=1.0,
                    input_tokens=fixed(96),
                    output_tokens=parse_lengths(OUTPUT_LEN, "output", read_lengths),
                )
                async with AsyncClient(cluster.addresses) as client:
                    runner = load.runner(timeout_s=arguments.deadline, through=client)
                    running = asyncio.create_task(runner.run(arrivals([phase], random.Random(arguments.seed))))
                    healed_at = await fault_loop(load, arguments, time.monotonic() + seconds, found)
                    strong_s = await strong_after(load, healed_at)
                    measured = await running
                left = await wait_idle(cluster, within_s=10.0)
                if math.isinf(strong_s) or left:
                    print(f"left: {left}\n{cluster.logs()}", file=sys.stderr)
    kinds = Counter("wrong" if one.wrong else one.kind for one in measured)
    for kind, count in kinds.most_common():
        example = next((one.detail for one in measured if one.kind == kind), "")
        found.row(kind, count, count / len(measured), example[:80])
    gaps = [max(one.itl_ms, default=0.0) for one in measured if one.done]
    found.extra |= {
        "capacity": capacity,
        "offered": len(measured),
        "replays": sum(one.replays for one in measured),
        "longest_gap_ms_p50": statistics.median(gaps) if gaps else None,
        "longest_gap_ms_max": max(gaps, default=None),
        "left": left,
    }
    found.goal("done_and_exact_share", kinds["DONE"] / max(len(measured), 1), DONE_SHARE, at_least=True)
    found.goal("wrong_answers", kinds["wrong"], 0)
    found.goal("unclear_ends", sum(kinds[kind] for kind in kinds if kind not in (*CLEAR, "DONE", "wrong")), 0)
    found.goal("full_strength_s", strong_s, STRONG_WITHIN_S)
    found.goal("left_behind", sum(left.values()), 0)
    return found.finish(arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="from one fault to the next")
    parser.add_argument("--heal", type=float, default=3.0, metavar="S")
    parser.add_argument("--deadline", type=float, default=60.0, metavar="S", help="of each request")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-memory", default="256MiB", help="of each instance")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="recorded answers of at least 64 tokens")
    report.add_arguments(parser)
    arguments = parser.parse_args()
    try:
        recording = recording_of(arguments)
        return asyncio.run(measure(arguments, recording))
    except SetupError as error:
        print(f"chaos: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    report.run(main)
