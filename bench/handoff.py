"""How fast KV moves between two instances over each transport, and what a running decode feels of it.

    python bench/handoff.py [--part rates|latency|plans|decode] [--megabytes 1 16 256] [--transports ...] [--rounds 7]
                            [--json FILE] [--check]

Rates: payload GB/s from the first piece's post to the last one's completion, of KV that is computed already; pack, digest,
transfer, check and unpack included; over each transport, and what moves the same bytes in messages of the same sizes between
the same two processes and does nothing with them: a memory copy, a bare ring of shared memory, a bare socket, a bare gRPC
stream, a bare gloo send (handoff_bare.py). All arms take turns; the first round warms up and is not counted; medians. CPU
seconds are of both ends. "p50 ms" is the whole handoff, from call to return, Release included.

Latency: the whole handoff of 1 MB by shm and tcp in turns.

Plans: 4 ranks to 2 against 1 rank to 1, the same bytes, each rank a process.

Decode: SmolLM2 decodes on one thread while its process pulls; a gap is the time from the end of one step to the end of
the next. The goal compares the longest gap under pulls with the median of the same run without one.
"""

import argparse
import asyncio
import statistics
from collections.abc import Sequence

import report
from handoff_decode import measure_decode
from handoff_ends import LLAMA, tokens_of
from handoff_rig import Rig, Taken, available

from biphase.protos.parallel_plan import ParallelPlan

TRANSPORTS = ("grpc", "tcp", "shm", "dist", "nixl")
PEERS = {"grpc": "grpc", "tcp": "tcp", "shm": "ring", "dist": "gloo"}
"""The bare arm of each transport; nixl has none."""

SHARES = {"grpc": 0.7, "tcp": 0.55, "dist": 0.55}
SHARES_WITHOUT_DIGESTS = {"shm": 0.8, "tcp": 0.75, "dist": 0.75}
OUT_OF_BAND = ("shm", "dist", "nixl")
LATENCY_MB = 1
LATENCY_ROUNDS = 30


def show(result: report.Report, size: int, arm: str, taken: Sequence[Taken], note: str = "") -> None:
    rates = [each.rate for each in taken]
    cpu = statistics.median(each.cpu_per_gb for each in taken)
    p50_ms = statistics.median(each.whole_s for each in taken) * 1e3
    result.row(size, arm, statistics.median(rates), min(rates), max(rates), p50_ms, cpu, note)


def rate(taken: Sequence[Taken]) -> float:
    return statistics.median(each.rate for each in taken)


async def measure_rates(result: report.Report, megabytes: int, transports: Sequence[str], rounds: int) -> None:
    num_tokens = tokens_of(LLAMA, megabytes)
    planes = [name for name in transports if name in OUT_OF_BAND]
    one = ParallelPlan()
    arms: dict[str, list[Taken]] = {}
    async with Rig("llama", num_tokens, (one, one), planes).running() as rig:
        sizes = {name: await rig.frame_sizes(name) for name in transports}
        for counted in range(-1, rounds):
            for name in transports:
                for digests in (True, False):
                    arm = name if digests else f"{name}, no digests"
                    arms.setdefault(arm, []).append(await rig.pull(name, digests=digests))
                if name in PEERS:
                    bare = PEERS[name]
                    arms.setdefault(f"bare {bare}", []).append(await rig.bare(bare, sizes[name]))
                if name == "shm":
                    arms.setdefault("bare ring, kept", []).append(await rig.bare("ring keep", sizes[name]))
            arms.setdefault("memory copy", []).append(await rig.bare("copy", [rig.num_bytes]))
            if counted < 0:
                arms.clear()
    result.extra.setdefault("rates", []).append(
        {
            "megabytes": megabytes,
            "message_bytes": sizes,
            "seconds": {arm: [each.seconds for each in taken] for arm, taken in arms.items()},
            "whole_seconds": {arm: [each.whole_s for each in taken] for arm, taken in arms.items()},
            "cpu_seconds": {arm: [each.cpu_s for each in taken] for arm, taken in arms.items()},
        }
    )
    for arm, taken in arms.items():
        name, _, _ = arm.partition(", ")
        note = ""
        if name in PEERS:
            share = rate(taken) / rate(arms[f"bare {PEERS[name]}"])
            note = f"{share:.0%} of bare {PEERS[name]}, {rate(taken) / rate(arms['memory copy']):.0%} of a copy"
        show(result, megabytes, arm, taken, note)
    judge_rates(result, megabytes, transports, arms)


def judge_rates(result: report.Report, megabytes: int, transports: Sequence[str], arms: dict[str, list[Taken]]) -> None:
    if megabytes <= LATENCY_MB:
        return
    for suffix, shares in (("", SHARES), (", no digests", SHARES_WITHOUT_DIGESTS)):
        for name, bound in shares.items():
            if name in transports:
                share = rate(arms[name + suffix]) / rate(arms[f"bare {PEERS[name]}"])
                label = f"{name}_of_bare_{PEERS[name]}{'_no_digests' if suffix else ''}_{megabytes}mb"
                result.goal(label, share, bound, at_least=True)
    if "shm" in transports:
        share = rate(arms["shm, no digests"]) / rate(arms["bare ring, kept"])
        result.goal(f"shm_of_bare_ring_kept_no_digests_{megabytes}mb", share, 0.8, at_least=True)
    if megabytes >= 256:
        if "shm" in transports:
            result.goal("shm_of_memory_copy", rate(arms["shm"]) / rate(arms["memory copy"]), 0.45, at_least=True)
        if "tcp" in transports and "grpc" in transports:
            cpu = {name: statistics.median(each.cpu_per_gb for each in arms[name]) for name in ("grpc", "tcp")}
            result.goal("grpc_cpu_of_tcp", cpu["grpc"] / cpu["tcp"], 1.3, at_least=True)


async def measure_latency(result: report.Report, transports: Sequence[str], rounds: int) -> None:
    """Of a small handoff, the transports in turns and nothing between them: what an instance sees that serves short
    prompts. Beside the other arms (measure_rates) caches are cold and gloo's threads are awake."""
    names = [name for name in ("shm", "tcp") if name in transports]
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    one = ParallelPlan()
    planes = [name for name in names if name in OUT_OF_BAND]
    async with Rig("llama", tokens_of(LLAMA, LATENCY_MB), (one, one), planes).running() as rig:
        for counted in range(-1, rounds):
            for name in names:
                pulled = await rig.pull(name, digests=True)
                if counted >= 0:
                    taken[name].append(pulled)
    result.extra["latency"] = {
        "megabytes": LATENCY_MB,
        "whole_seconds": {name: [each.whole_s for each in values] for name, values in taken.items()},
    }
    for name, values in taken.items():
        show(result, LATENCY_MB, f"{name}, in turns", values)
        p50_ms = statistics.median(each.whole_s for each in values) * 1e3
        result.goal(f"{name}_p50_ms_{LATENCY_MB}mb", p50_ms, 3.0)


async def measure_plans(result: report.Report, megabytes: int, transports: Sequence[str], rounds: int) -> None:
    """4 ranks to 2 against 1 to 1, in turns."""
    num_tokens = tokens_of(LLAMA, megabytes)
    planes = [name for name in transports if name in OUT_OF_BAND]
    pairs = {"1 to 1": (1, 1), "4 to 2": (4, 2)}
    taken: dict[tuple[str, str], list[Taken]] = {}
    rigs = {
        name: Rig("llama", num_tokens, (ParallelPlan(tp=source), ParallelPlan(tp=reader)), planes)
        for name, (source, reader) in pairs.items()
    }
    async with rigs["1 to 1"].running(), rigs["4 to 2"].running():
        for counted in range(-1, rounds):
            for transport in transports:
                for name, rig in rigs.items():
                    taken.setdefault((transport, name), []).append(await rig.pull(transport, digests=True))
            if counted < 0:
                taken.clear()
    result.extra.setdefault("plans", []).append(
        {
            "megabytes": megabytes,
            "whole_seconds": {" ".join(key): [each.whole_s for each in values] for key, values in taken.items()},
            "cpu_seconds": {" ".join(key): [each.cpu_s for each in values] for key, values in taken.items()},
        }
    )
    for transport in transports:
        one, many = taken[transport, "1 to 1"], taken[transport, "4 to 2"]
        cpu, wall = (
            statistics.median(map(of, many)) / statistics.median(map(of, one))
            for of in (lambda each: each.cpu_per_gb, lambda each: each.whole_s)
        )
        show(result, megabytes, f"{transport}, 1 to 1", one)
        show(result, megabytes, f"{transport}, 4 to 2", many, f"{cpu:.2f} x the CPU, {wall:.2f} x the time")
        if megabytes >= 256:
            result.goal(f"{transport}_4_to_2_cpu", cpu, 1.3)
            result.goal(f"{transport}_4_to_2_wall", wall, 2.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["rates", "latency", "plans", "decode"], help="only this part")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 16, 256], help="of KV (default 1 16 256)")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, help="default: all that are here")
    parser.add_argument("--rounds", type=int, default=7, help="that count, of rates and plans (default 7)")
    parser.add_argument("--pulls", type=int, default=9, help="beside a decode (default 9)")
    report.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.pulls < 1 or min(arguments.megabytes) < 1:
        parser.error("there must be at least 1 round, 1 pull and 1 MB")
    transports = available(arguments.transports or TRANSPORTS)
    result = report.Report("handoff", ["MB", "what", "GB/s", "least", "most", "p50 ms", "CPU s/GB", "note"])
    for megabytes in arguments.megabytes:
        if arguments.part in (None, "rates"):
            asyncio.run(measure_rates(result, megabytes, transports, arguments.rounds))
        if arguments.part in (None, "plans"):
            asyncio.run(measure_plans(result, megabytes, transports, arguments.rounds))
    if arguments.part in (None, "latency"):
        asyncio.run(measure_latency(result, transports, max(arguments.rounds, LATENCY_ROUNDS)))
    if arguments.part in (None, "decode"):
        asyncio.run(measure_decode(result, arguments.pulls))
    return result.finish(arguments)


if __name__ == "__main__":
    report.run(main)
