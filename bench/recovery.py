"""What is lost when something dies: every fault on a deployment under load, whose processes have hosts of their own.

    python bench/recovery.py [--faults kill:decode stop:prefill ...] [--repeat 3] [--kills 10] [--model smollm2] [--cores 0.5]
                             [--tokens FILE] [--json FILE] [--check]      (half an hour)

1 prefill and 2 decode instances, 2 routers, mode auto, float32 and codec raw, each process in a network namespace (root).
Faults: kill -9, SIGSTOP and partition (packets dropped, no end is told) of a prefill instance, a decode instance, the
controller and one of two routers, and a partition of prefill and decode instance from each other alone; stops and partitions
heal after 10 s. Each life of an instance has a share of the processors of its own (--cores, by cgroup quota), as on a host of
its own: else the start of a replacement takes its time from the instance that prefills what was displaced. Answers are
compared with recorded ones (``record_tokens.py``; tests/reference has SmolLM2's).

A case is a burst, so that all are soon at work, beside an even stream until full strength; it hits once the victim has work in
hand (``fault_work.py``). A request is *lost* when it is not done, save UNAVAILABLE in time at the faulted router before it
answers again. *Seen*: every router has the instance as not ready, by the routers' own clocks; of a router: its last stream has
ended at the client; of a pair: a router knows of a handoff that failed. The gap is the longest silence of a stream that ran on
the lost instance and went on elsewhere, the bound detection + displaced tokens / prefill rate under the same load
(``prefill_work.py``) + 1 s. A *former* life was replaced and still runs 10 s after the heal.
"""

import argparse
import asyncio
import contextlib
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpu_shares
import report
from fault_case import INPUT_TOKENS, Load, load_of, run_case
from fault_outcome import Fault, Kind, Outcome
from fault_work import BURST
from netns_cluster import CONTROLLER, NetnsCluster, netns_cluster
from prefill_work import gap_bound_s, prefill_rate
from record_tokens import record
from recovery_judge import judge, per_fault

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
LONG_LEN, BURST_LEN, EVEN_LEN = "uniform:96:128", "uniform:32:64", "uniform:16:32"
"""Answers of the burst where streams of a decode instance are to be displaced or a router is to have some (half of the burst: the
first must not end before the last has begun), of the burst elsewhere, of the even stream: short, for a case lasts until its
last answer has ended."""
LONGEST_S = 150.0
EVEN_SHARE = 0.25
"""Of the capacity, for the even stream: the burst is the rest of the load."""
RATE_S = 12.0
"""How long the load goes on under which the prefill rate is measured."""
CORES = 0.5
PREFILL_LIMITS = {"max_num_batched_tokens": 128, "max_queued_tokens": 1280}
"""Steps of two prompts, some 0.8 s on such a share: the last of what is displaced need not wait for a step of many new ones
beside it. Half of the queue is the replays' budget, room for five streams of 120 tokens."""
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
    "case s",
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


def requests(
    rate: float, seed: int, burst: Lengths, even: Lengths | None = None, seconds: float = LONGEST_S
) -> list[Arrival]:
    """A burst, so that every instance is soon at work, then an even stream for so many seconds; with answers of such lengths,
    those of the even stream as the burst's unless told."""

    def phase(name: str, seconds: float, rate: float, burstiness: float, output: Lengths) -> Phase:
        lengths = {"input_tokens": fixed(INPUT_TOKENS), "output_tokens": output}
        return Phase(name=name, seconds=seconds, rate=rate, rate_end=rate, burstiness=burstiness, **lengths)

    rush = BURST + 0.5  # requests in a second: what is due at a phase's very end is the next one's
    phases = (phase("burst", 1.0, rush, math.inf, burst), phase("even", seconds, rate, 1.0, even or burst))
    return list(arrivals(phases, random.Random(seed)))


def requests_for(fault: Fault, rate: float, seed: int) -> list[Arrival]:
    """The load of a case: streams that are to be cut off last longer."""
    burst = LONG_LEN if fault.role in ("decode", "router") and fault.kind != "pair" else BURST_LEN
    return requests(rate, seed, lengths_of(burst), lengths_of(EVEN_LEN))


def lengths_of(text: str) -> Lengths:
    return parse_lengths(text, "output", read_lengths)


async def capacity_of(load: Load, seed: int, output: Lengths) -> float:
    """Requests/s at saturation, without a fault; a few that warm everything up are not counted."""
    some = requests(1.0, seed, output)
    await _faultless(load, _at_once(some[:4]))
    found = await _faultless(load, _at_once(some[: 2 * BURST]))
    return len(found) / max(one.ended_s for one in found)


async def prefill_rate_at(load: Load, rate: float, seed: int) -> float:
    """Prompt tokens/s that a prefilling instance gets under the load of a case without its fault."""
    return prefill_rate(
        await _faultless(load, requests(rate, seed, lengths_of(BURST_LEN), lengths_of(EVEN_LEN), RATE_S))
    )


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
        "prefill": {"replicas": 1, **PREFILL_LIMITS, **plan},
        "decode": {"replicas": 2, **plan},
        "drain_s": 1.0,
    }


def cores_for(wanted: float | None) -> tuple[float, str]:
    """Of each instance, and what is to be said of it: unless told so many as are meant, where cgroups allow it."""
    if wanted is not None:
        return wanted, ""
    reason = cpu_shares.lacking()
    return (0.0, f"all instances share the processors, a gap may be longer for it: {reason}") if reason else (CORES, "")


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
    prompts = RecordedPrompts(recording.usable, seed=arguments.seed, candidates=16)
    cores, said = cores_for(arguments.cores)
    if said:
        print(f"recovery: {said}", file=sys.stderr, flush=True)
    found.extra["cores"] = cores
    deploy = deploy_of(arguments)
    while due:  # a deployment that does not come back is replaced, and what it did is in the table
        with tempfile.TemporaryDirectory() as folder, own_cores(cores) as env:
            num_instances = sum(INSTANCES.values())
            async with netns_cluster(Path(folder), deploy, num_instances=num_instances, env=env) as cluster:
                async with load_of(cluster, prompts) as load:
                    offered = EVEN_SHARE * await capacity_of(load, arguments.seed, lengths_of(EVEN_LEN))
                    rate = await prefill_rate_at(load, offered, arguments.seed)
                    words = f"even stream {offered:.2f} requests/s, prompts are prefilled at {rate:.0f} tokens/s"
                    print(words, file=sys.stderr, flush=True)
                    while due:
                        word, number = due.pop(0)
                        seed = arguments.seed + 1000 * number + sum(map(ord, word))
                        fault, began_s = fault_of(word, cluster), time.monotonic()
                        outcome = await run_case(load, fault, requests_for(fault, offered, seed), INSTANCES)
                        bound_s = gap_bound_s(outcome.seen_s, outcome.displaced_tokens, rate)
                        outcomes.append((outcome, bound_s))
                        _row(found, outcome, bound_s, time.monotonic() - began_s)
                        found.write(arguments)
                        if math.isnan(outcome.strong_s):
                            print(f"not at full strength again\n{cluster.logs()}", file=sys.stderr, flush=True)
                            break
    judge(found, outcomes)
    found.extra["per_fault"] = per_fault([outcome for outcome, _ in outcomes])
    return found.finish(arguments)


def _row(found: report.Report, outcome: Outcome, bound_s: float, case_s: float) -> None:
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
        case_s,
    )
    words = f"{outcome.fault.label}: seen {outcome.seen_s:.3f} s, {len(outcome.lost)} of {len(outcome.measured)} lost, "
    words += f"{outcome.wrong} wrong, {len(outcome.displaced)} displaced with {outcome.displaced_tokens} tokens, "
    words += f"gap {outcome.gap_s:.2f} of {bound_s:.2f} s, full strength {outcome.strong_s:.1f} s, case {case_s:.0f} s"
    print(words, file=sys.stderr, flush=True)
    for kind in sorted({one.kind for one in outcome.lost}):
        print(f"    {kind}: {next(one.detail for one in outcome.lost if one.kind == kind)}", file=sys.stderr)
    for name in ("left", "former", "restarted"):
        if getattr(outcome, name):
            print(f"    {name}: {getattr(outcome, name)}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults", nargs="+", choices=all_faults(), metavar="KIND:VICTIM", help=", ".join(all_faults())
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10, help="of prefill and decode instance, each")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-memory", default="256MiB", help="of each instance")
    parser.add_argument(
        "--cores", type=float, help=f"of each instance (0: all share what there is; {CORES:g} where cgroups allow it)"
    )
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
