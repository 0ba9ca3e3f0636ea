"""What is lost when something dies: every fault on a deployment under load, whose processes have hosts of their own.

    python bench/recovery.py [--faults kill:decode stop:prefill ...] [--repeat 3] [--kills 10] [--model smollm2] [--cores 0.5]
                             [--tokens FILE] [--json FILE] [--check]

1 prefill and 2 decode instances, 2 routers, mode auto, float32 and codec raw, each process in a network namespace (root).
Faults: kill -9, SIGSTOP and partition (packets dropped, no end is told) of a prefill instance, a decode instance, the
controller and one of two routers, and a partition of prefill and decode instance from each other alone; stops and partitions
heal after 10 s. Each life of an instance has a share of the processors of its own (--cores, by cgroup quota), as on a host of
its own: else the start of a replacement takes its time from the instance that prefills what was displaced. Answers are compared with recorded ones (``record_tokens.py``; tests/reference has SmolLM2's).

A request is *lost* when it is not done, save UNAVAILABLE of streams at the faulted router. *Seen*: every router has the
instance as not ready, by the routers' own clocks; of a router: its last stream has ended at the client. The gap is the longest
silence of a stream that ran on the lost instance and went on elsewhere, the bound detection + displaced tokens / prefill rate
under the same load (``prefill_work.py``) + 1 s. A *former* life was replaced and still runs 10 s after the heal.
"""

import argparse
import asyncio
import contextlib
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpu_shares
import report
from fault_case import STREAMS_ON_VICTIM, Load, load_of, run_case
from fault_outcome import Fault, Kind, Outcome, worst
from netns_cluster import CONTROLLER, NetnsCluster, netns_cluster
from prefill_work import gap_bound_s, prefill_rate
from record_tokens import record

from biphase.client.bench.arrivals import Arrival, Phase, arrivals
from biphase.client.bench.lengths import Lengths, fixed, parse_lengths
from biphase.client.bench.measured import Measured
from biphase.client.bench.phases_file import read_lengths
from biphase.client.bench.prompts import RecordedPrompts
from biphase.client.bench.tokens_file import Recording, read_recording
from biphase.protos.errors import SetupError, one_line

INSTANCES = {"prefill": 1, "decode": 2}
VICTIMS = ("prefill", "decode", CONTROLLER, "router")
KINDS: tuple[Kind, ...] = ("kill", "stop", "partition")
RECORDED = Path(__file__).resolve().parent.parent / "tests" / "reference" / "smollm2_recorded.jsonl"
OUTPUT_LEN = "uniform:96:256"
BURST, LONGEST_S = 10, 150.0
RATE_REQUESTS, RATE_LONGEST_S = 24, 60.0
"""How long the prefill rate is measured: for so many requests, at most so many seconds."""
SEEN_WITHIN_S: dict[str, float] = {"kill": 0.1, "stop": 2.5, "partition": 2.5}
ENDED_WITHIN_S, STOPPED_WITHIN_S = 3.0, 5.0
"""Of a router: its streams at the client, their work on the instances."""
COLUMNS = (
    "fault",
    "on victim",
    "seen s",
    "requests",
    "lost",
    "at router",
    "replays",
    "wrong",
    "left",
    "former",
    "gap s",
    "bound s",
    "strong s",
)


def all_faults() -> list[str]:
    return [f"{kind}:{victim}" for kind in KINDS for victim in VICTIMS] + ["pair:decode"]


def fault_of(word: str, cluster: NetnsCluster) -> Fault:
    """``word`` is KIND:ROLE; of several of the role, the first by name is hit."""
    kind, _, role = word.partition(":")
    lives = sorted(cluster.lives())

    def first(wanted: str) -> str:
        return next(name for name in lives if name.partition("-")[0] == wanted)

    if kind == "pair":
        return Fault(kind="pair", victim=first("decode"), other=first("prefill"))
    return Fault(kind=kind, victim=first(role))  # type: ignore[arg-type]


def requests(rate: float, seed: int, output: Lengths) -> list[Arrival]:
    """A burst, so that every instance is soon at work, then an even stream for as long as a case may take."""
    shape = {"input_tokens": fixed(96), "output_tokens": output}
    phases = (
        Phase(name="burst", seconds=1.0, rate=BURST, rate_end=BURST, burstiness=math.inf, **shape),  # type: ignore[arg-type]
        Phase(name="even", seconds=LONGEST_S, rate=rate, rate_end=rate, burstiness=1.0, **shape),  # type: ignore[arg-type]
    )
    return list(arrivals(phases, random.Random(seed)))


async def capacity_of(load: Load, seed: int, output: Lengths) -> float:
    """Requests/s at saturation, without a fault; a few that warm everything up are not counted."""
    some = requests(1.0, seed, output)
    await _faultless(load, _at_once(some[:4]))
    found = await _faultless(load, _at_once(some[: 2 * BURST]))
    return len(found) / max(one.ended_s for one in found)


async def prefill_rate_at(load: Load, rate: float, seed: int, output: Lengths) -> float:
    """Prompt tokens/s that a prefilling instance gets under so many requests/s."""
    some = [one for one in requests(rate, seed, output) if one.at_s >= 1.0][:RATE_REQUESTS]
    return prefill_rate(await _faultless(load, [one for one in some if one.at_s < 1.0 + RATE_LONGEST_S]))


async def _faultless(load: Load, due: Sequence[Arrival]) -> list[Measured]:
    found = await load.runner().run(due)
    bad = [one for one in found if not one.done or one.wrong]
    if bad:
        raise SystemExit(f"without any fault a request failed or was wrong: {bad[0]}")
    return found


def _at_once(due: Sequence[Arrival]) -> list[Arrival]:
    return [replace(one, at_s=0.0) for one in due]


def recording_of(arguments: argparse.Namespace) -> Recording:
    """The given one, the one in the repository, or, of another model, one made now."""
    if arguments.tokens or arguments.model == "smollm2":
        return read_recording(arguments.tokens or RECORDED)
    return record(arguments.model, num_prompts=32, input_len="uniform:32:160", output_len=256)


def deploy_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The deploy file."""
    plan = {"threads": 1, "kv_memory": arguments.kv_memory}
    return {
        "model": arguments.model,
        "mode": "auto",
        "kv_transport": "tcp",
        "max_model_len": 1024,
        "prefill": {"replicas": 1, **plan},
        "decode": {"replicas": 2, **plan},
        "drain_s": 1.0,
    }


@contextlib.contextmanager
def own_cores(cores: float) -> Iterator[dict[str, str]]:
    """The environment that gives each instance so many; empty where 0 is asked for. SetupError where it cannot be."""
    if not cores:
        yield {}
        return
    if reason := cpu_shares.lacking():
        raise SetupError(f"--cores {cores:g}: {reason}; --cores 0 lets all instances share what there is")
    with cpu_shares.cpu_shares(cores) as env:
        # `ip netns exec` hides the cgroups of this mount namespace behind a /sys of its own
        yield {**env, "BIPHASE_CGROUP": f"/proc/{os.getpid()}/root{env['BIPHASE_CGROUP']}"}


async def measure(arguments: argparse.Namespace, recording: Recording) -> int:
    found = report.Report("recovery", COLUMNS)
    outcomes: list[tuple[Outcome, float]] = []
    words = arguments.faults or all_faults()
    due = [
        (word, number)
        for word in words
        for number in range(arguments.kills if word in ("kill:prefill", "kill:decode") else arguments.repeat)
    ]
    prompts = RecordedPrompts(recording.usable, seed=arguments.seed, candidates=1)
    output = parse_lengths(OUTPUT_LEN, "output", read_lengths)
    deploy = deploy_of(arguments)
    while due:  # a deployment that does not come back is replaced, and what it did is in the table
        with tempfile.TemporaryDirectory() as folder, own_cores(arguments.cores) as env:
            num_instances = sum(INSTANCES.values())
            async with netns_cluster(Path(folder), deploy, num_instances=num_instances, env=env) as cluster:
                async with load_of(cluster, prompts) as load:
                    capacity = await capacity_of(load, arguments.seed, output)
                    rate = await prefill_rate_at(load, capacity / 2, arguments.seed, output)
                    words = f"capacity {capacity:.2f} requests/s, at half of it a prompt is prefilled at {rate:.0f} tokens/s"
                    print(words, file=sys.stderr, flush=True)
                    while due:
                        word, number = due.pop(0)
                        seed = arguments.seed + 1000 * number + sum(map(ord, word))
                        outcome = await run_case(
                            load, fault_of(word, cluster), requests(capacity / 2, seed, output), INSTANCES
                        )
                        bound_s = gap_bound_s(outcome.seen_s, outcome.displaced_tokens, rate)
                        outcomes.append((outcome, bound_s))
                        _row(found, outcome, bound_s)
                        found.write(arguments)
                        if math.isnan(outcome.strong_s):
                            print(f"not at full strength again\n{cluster.logs()}", file=sys.stderr, flush=True)
                            break
    judge(found, outcomes)
    found.extra["per_fault"] = _per_fault([outcome for outcome, _ in outcomes])
    return found.finish(arguments)


def _row(found: report.Report, outcome: Outcome, bound_s: float) -> None:
    found.row(
        outcome.fault.label,
        outcome.on_victim,
        outcome.seen_s,
        len(outcome.measured),
        len(outcome.lost),
        len(outcome.excused),
        outcome.replays,
        outcome.wrong,
        sum(outcome.left.values()),
        len(outcome.former),
        outcome.gap_s,
        bound_s,
        outcome.strong_s,
    )
    words = f"{outcome.fault.label}: seen {outcome.seen_s:.3f} s, {len(outcome.lost)} of {len(outcome.measured)} lost, "
    words += f"{outcome.wrong} wrong, {len(outcome.displaced)} displaced with {outcome.displaced_tokens} tokens, "
    words += f"gap {outcome.gap_s:.2f} of {bound_s:.2f} s, full strength {outcome.strong_s:.1f} s"
    print(words, file=sys.stderr, flush=True)
    for kind in sorted({one.kind for one in outcome.lost}):
        print(f"    {kind}: {next(one.detail for one in outcome.lost if one.kind == kind)}", file=sys.stderr)
    for name in ("left", "former", "restarted"):
        if getattr(outcome, name):
            print(f"    {name}: {getattr(outcome, name)}", file=sys.stderr, flush=True)


def _per_fault(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Medians and maxima, as docs/reliability.md has them."""
    found: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(outcome.fault.label for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.fault.label == label]
        of: dict[str, float] = {"cases": len(mine), "lost": sum(len(one.lost) for one in mine)}
        for name in ("seen_s", "gap_s", "strong_s", "stopped_s"):
            values = [value for one in mine if not math.isnan(value := getattr(one, name))]
            if values:
                of |= {f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
        found[label] = of
    return found


def judge(found: report.Report, outcomes: Sequence[tuple[Outcome, float]]) -> None:
    """What was not measured, or had nothing to lose, is a goal missed."""
    every = [outcome for outcome, _ in outcomes]
    found.goal("requests_fewest", min(len(one.measured) for one in every), BURST, at_least=True)
    found.goal("on_victim_fewest", min(one.on_victim for one in every), STREAMS_ON_VICTIM, at_least=True)
    found.goal("lost_requests", sum(len(one.lost) for one in every), 0)
    found.goal("wrong_tokens", sum(one.wrong for one in every), 0)
    found.goal("leaked", sum(sum(one.left.values()) for one in every), 0)
    found.goal("former_lives_left", sum(len(one.former) for one in every), 0)
    found.goal("others_restarted", sum(len(one.restarted) for one in every), 0)
    found.goal("not_back_at_full_strength", sum(math.isnan(one.strong_s) for one in every), 0)
    for label in dict.fromkeys(one.fault.label for one in every):
        cases = [(one, bound_s) for one, bound_s in outcomes if one.fault.label == label]
        role, kind = cases[0][0].fault.role, cases[0][0].fault.kind
        name = f"{kind}_{role}"
        if role == "router":
            found.goal(f"{name}_streams_ended_worst_s", worst(one.seen_s for one, _ in cases), ENDED_WITHIN_S)
            found.goal(f"{name}_work_stopped_worst_s", worst(one.stopped_s for one, _ in cases), STOPPED_WITHIN_S)
        elif role != CONTROLLER and kind != "pair":
            found.goal(f"{name}_seen_worst_s", worst(one.seen_s for one, _ in cases), SEEN_WITHIN_S[kind])
        if role == "decode" and kind != "pair":
            fewest = min(len(one.displaced) for one, _ in cases)
            found.goal(f"{name}_displaced_fewest", fewest, STREAMS_ON_VICTIM, at_least=True)
            found.goal(f"{name}_gap_over_bound_worst_s", worst(one.gap_s - bound_s for one, bound_s in cases), 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults", nargs="+", choices=all_faults(), metavar="KIND:VICTIM", help=", ".join(all_faults())
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10, help="of prefill and decode instance, each")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-memory", default="256MiB", help="of each instance")
    parser.add_argument("--cores", type=float, default=0.5, help="of each instance (0: all share what there is)")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="recorded answers of at least 256 tokens")
    parser.add_argument("--seed", type=int, default=1)
    report.add_arguments(parser)
    arguments = parser.parse_args()
    try:
        recording = recording_of(arguments)
        return asyncio.run(measure(arguments, recording))
    except SetupError as error:
        print(f"recovery: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    report.run(main)
