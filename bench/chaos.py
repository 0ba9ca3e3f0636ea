"""Seeded load, and a random fault every ten seconds: what is left of the service, and whether all comes back.

    python bench/chaos.py [--minutes 2] [--seed 1] [--every 10] [--heal 3] [--tokens FILE] [--model smollm2] [--json FILE] [--check]

1 prefill and 2 decode instances and 2 routers on hosts of their own (``netns_cluster.py``). The load is half of what the
deployment does without a fault, measured first. Every --every seconds a fault begins, healed after --heal seconds; the seed says which: kill
-9, SIGSTOP or partition of an instance, a router or the controller, or a partition of one pair. One client knows both routers:
what has no token yet when its router goes is sent to the other.

Goals: at least 80 % of the offered requests done and token-exact, the rest refused with a clear status; full strength within
30 s of the end of the last fault; every counter back to zero, no former life left.
"""

import argparse
import asyncio
import contextlib
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import report
from fault_case import Load, inject, load_of
from fault_outcome import KINDS_OF, Fault
from idle_counters import wait_idle
from netns_cluster import CONTROLLER, netns_cluster
from recovery import INSTANCES, capacity_of, deploy_of, recording_of

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Phase, arrivals
from biphase.client.bench.lengths import fixed, parse_lengths
from biphase.client.bench.phases_file import read_lengths
from biphase.client.bench.prompts import RecordedPrompts
from biphase.client.bench.tokens_file import Recording
from biphase.protos.errors import SetupError, one_line

DONE_SHARE, STRONG_WITHIN_S = 0.8, 30.0
CLEAR = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED")
"""What a request may end with that is not done: the client knows what to think of it. A deadline says nothing."""
NUM_ROUTERS = 2
LATE_S = 2.0
"""A victim that is between two lives when it is due is hit this late at most."""
OUTPUT_LEN = "uniform:16:64"


def schedule(seed: int, seconds: float, every_s: float, heal_s: float) -> list[tuple[float, Fault]]:
    """(when it begins, the fault), all of them healed within ``seconds``. Pure."""
    draws = random.Random(seed)
    of_role = {role: [f"{role}-{index}" for index in range(count)] for role, count in INSTANCES.items()}
    routers = [f"router-{index}" for index in range(NUM_ROUTERS)]
    victims = [*of_role["prefill"], *of_role["decode"], *routers, CONTROLLER]
    found, number = [], 1
    while number * every_s + heal_s <= seconds:
        kind = draws.choice(KINDS_OF)
        if kind == "pair":
            fault = Fault(kind=kind, victim=draws.choice(of_role["decode"]), other=draws.choice(of_role["prefill"]))
        else:
            fault = Fault(kind=kind, victim=draws.choice(victims))
        found.append((number * every_s, fault))
        number += 1
    return found


async def fault_loop(load: Load, arguments: argparse.Namespace, began_s: float, found: report.Report) -> float:
    """All faults of the schedule, counted from ``began_s`` (monotonic); returns when the last one was over."""
    over_s, done = began_s, found.extra.setdefault("faults", [])
    for at_s, fault in schedule(arguments.seed, 60.0 * arguments.minutes, arguments.every, arguments.heal):
        await asyncio.sleep(began_s + at_s - time.monotonic())
        heal = await _hit(load, fault)
        if heal is None:
            print(f"{fault.label} ({fault.victim}): it has not been there", file=sys.stderr, flush=True)
            continue
        hit_s = over_s = time.monotonic()
        print(f"fault at {hit_s - began_s:.1f} s: {fault.label} ({fault.victim})", file=sys.stderr, flush=True)
        done.append([hit_s - began_s, fault.kind, fault.victim, fault.other])
        await asyncio.sleep(began_s + at_s + arguments.heal - time.monotonic())
        heal()
        if fault.kind != "kill":
            over_s = time.monotonic()
    return over_s


async def _hit(load: Load, fault: Fault) -> Callable[[], None] | None:
    """What heals it; None where the victim, or its other end, has not lived in time."""
    deadline = time.monotonic() + LATE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(KeyError, RuntimeError):
            return inject(load.cluster, fault)
        await asyncio.sleep(0.05)
    return None


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
        async with netns_cluster(
            Path(folder), deploy, num_instances=sum(INSTANCES.values()), num_routers=NUM_ROUTERS, spares=4
        ) as cluster:
            async with load_of(cluster, prompts) as load:
                capacity = await capacity_of(load, arguments.seed, parse_lengths(OUTPUT_LEN, "output", read_lengths))
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
                    over_s = await fault_loop(load, arguments, time.monotonic(), found)
                    strong_s = await strong_after(load, over_s)
                    measured = await running
                left, former = await wait_idle(cluster, within_s=10.0), cluster.former_lives()
                if math.isinf(strong_s) or left or former:
                    print(f"left: {left}, former lives: {former}\n{cluster.logs()}", file=sys.stderr)
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
    due = len(schedule(arguments.seed, seconds, arguments.every, arguments.heal))
    found.goal("offered_of_half_capacity", len(measured) / (seconds * capacity / 2), 0.8, at_least=True)
    found.goal("faults_of_those_due", len(found.extra["faults"]) / due if due else math.nan, 0.9, at_least=True)
    found.goal("done_and_exact_share", kinds["DONE"] / max(len(measured), 1), DONE_SHARE, at_least=True)
    found.goal("wrong_answers", kinds["wrong"], 0)
    found.goal("unclear_ends", sum(kinds[kind] for kind in kinds if kind not in (*CLEAR, "DONE", "wrong")), 0)
    found.goal("full_strength_s", strong_s, STRONG_WITHIN_S)
    found.goal("left_behind", sum(left.values()), 0)
    found.goal("former_lives_left", len(former), 0)
    return found.finish(arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="from the begin of a fault to the next")
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
