"""How soon a killed or stopped instance is seen, and what its death costs.

    python bench/faults.py [--backend ray|process] [--parts instances ranks] [--kills 20] [--stops 4] [--steady 60]
                           [--rank-rounds 1] [--json FILE] [--check]

*instances*: a fault is *seen* when the router shows the instance as not ready (it dispatches nothing there any more, and
what it had there goes on elsewhere). There is one of each role, in mode strict: streams of a lost decode instance go on by
replay once it is back, prompts of a lost prefill instance end UNAVAILABLE where that takes longer than they wait. Both
cores are kept busy throughout: by the requests themselves, or by one busy loop per core while the deployment idles.

*ranks*: kill -9 and SIGSTOP of every rank of a tp 2 x pp 2 instance, idle and in a step; *seen* is when the last of its
processes is gone (``fault_ranks.py``).
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import report
from fault_cluster import Stream, busy_loops, cluster, instance, start_stream, until, wait_back
from fault_ranks import measure_ranks

from biphase.client import AsyncClient
from biphase.protos.errors import Unavailable

FLAGS = ("--model", "smollm2", "--prefill", "1", "--decode", "1")
LONG_PROMPT = [1000 + position % 20000 for position in range(500)]
"""Two of them fit the queue of a prefill instance, and take it a second."""
SHORT_PROMPT = [2000 + position % 20000 for position in range(40)]


async def one_fault(client: AsyncClient, role: str, number: signal.Signals, busy: bool) -> tuple[float, float, int]:
    """Hit the instance of ``role``; (ms until seen, s until a new one serves, streams that went on by replay)."""
    pid, incarnation, _ = await instance(client, f"{role}-0")
    doomed: list[Stream] = []
    if busy:
        if role == "prefill":  # in the middle of a long prompt
            doomed = [start_stream(client, LONG_PROMPT, 8) for _ in range(2)]
            await asyncio.sleep(0.3)
        else:
            doomed = [start_stream(client, SHORT_PROMPT, 200) for _ in range(4)]

            async def all_run() -> bool:
                return all(len(stream.tokens) >= 3 for stream in doomed)

            await until(seconds=30, check=all_run)
    with contextlib.nullcontext() if busy else busy_loops(os.cpu_count() or 1, 30):
        if not busy:
            await asyncio.sleep(0.5)
        hit_at = time.monotonic()
        os.kill(pid, number)

        async def seen() -> bool:
            now_pid, _, state = await instance(client, f"{role}-0")
            return now_pid != pid or state != "ready"

        await until(seconds=10, check=seen)
        seen_at = time.monotonic()
    await wait_back(client, f"{role}-0", incarnation)
    back_s = time.monotonic() - hit_at
    outcomes = [await stream.task for stream in doomed]
    for outcome in outcomes:
        may_fail = role == "prefill" and isinstance(outcome.error, Unavailable)
        assert outcome.error is None or may_fail, f"a stream of the dead {role} ended with {outcome.error!r}"
    after = await start_stream(client, SHORT_PROMPT, 4).task
    if after.error is not None:
        raise AssertionError(f"the first request after the restart failed: {after.error}")
    return 1000 * (seen_at - hit_at), back_s, sum(outcome.error is None for outcome in outcomes)


async def survivors(client: AsyncClient) -> tuple[int, int, int]:
    """Strict mode, P killed: handed-off requests must go on token-exact. (survived exact, of, failed clearly)."""
    alone = (await start_stream(client, SHORT_PROMPT, 64).task).tokens
    decoding = [start_stream(client, SHORT_PROMPT, 64) for _ in range(4)]

    async def handed_off() -> bool:
        return all(len(stream.tokens) >= 3 for stream in decoding)

    await until(seconds=30, check=handed_off)
    prefilling = [start_stream(client, LONG_PROMPT, 8) for _ in range(2)]
    await asyncio.sleep(0.3)
    pid, incarnation, _ = await instance(client, "prefill-0")
    os.kill(pid, signal.SIGKILL)
    finished = [await stream.task for stream in decoding]
    failed = [await stream.task for stream in prefilling]
    exact = sum(outcome.error is None and outcome.tokens == alone for outcome in finished)
    clear = sum(isinstance(outcome.error, Unavailable) for outcome in failed)
    await wait_back(client, "prefill-0", incarnation)
    return exact, len(decoding), clear


async def goes_local(client: AsyncClient) -> bool:
    """Auto mode: with P away a new request is prefilled by D, and says so."""
    pid, incarnation, _ = await instance(client, "prefill-0")
    os.kill(pid, signal.SIGKILL)

    async def gone() -> bool:
        return (await instance(client, "prefill-0"))[2] != "ready"

    await until(seconds=5, check=gone)
    outcome = await start_stream(client, SHORT_PROMPT, 4).task
    await wait_back(client, "prefill-0", incarnation)
    return outcome.error is None and outcome.decision == "local"


async def falsely_dead(client: AsyncClient, seconds: float) -> int:
    """Four busy loops beside a serving deployment; how many instances were replaced or lost meanwhile."""
    before = [await instance(client, f"{role}-0") for role in ("prefill", "decode")]
    lost = 0
    with busy_loops(4, seconds + 30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            outcome = await start_stream(client, SHORT_PROMPT, 8).task
            lost += outcome.error is not None
            for role in ("prefill", "decode"):
                lost += (await instance(client, f"{role}-0"))[2] != "ready"
    after = [await instance(client, f"{role}-0") for role in ("prefill", "decode")]
    return lost + sum(old[:2] != new[:2] for old, new in zip(before, after, strict=True))


async def measure(arguments: argparse.Namespace) -> int:
    found = report.Report("faults", ["fault", "role", "deployment", "seen ms", "back s", "streams went on"])
    if "ranks" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            await measure_ranks(arguments.backend, arguments.rank_rounds, Path(folder), found)
    if "instances" in arguments.parts:
        await measure_instances(arguments, found)
    return found.finish(arguments)


async def measure_instances(arguments: argparse.Namespace, found: report.Report) -> None:
    kills: list[float] = []
    stops: list[float] = []
    async with cluster(arguments.backend, "strict", FLAGS) as (_, client):
        await start_stream(client, SHORT_PROMPT, 4).task
        for label, number, count, times in (
            ("kill -9", signal.SIGKILL, arguments.kills, kills),
            ("SIGSTOP", signal.SIGSTOP, arguments.stops, stops),
        ):
            for index in range(count):
                role, busy = ("prefill", "decode")[index % 2], index % 4 >= 2
                seen_ms, back_s, ended = await one_fault(client, role, number, busy)
                times.append(seen_ms)
                found.row(label, role, "busy" if busy else "idle", seen_ms, back_s, ended)
                print(
                    f"{label} {role}: seen after {seen_ms:.1f} ms, back after {back_s:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
        exact, of, clear = await survivors(client)
        found.row(
            "kill -9",
            "prefill",
            f"strict: {exact} of {of} handed-off streams exact, {clear} of 2 others UNAVAILABLE",
            "",
            "",
            "",
        )
        dead = await falsely_dead(client, arguments.steady)
        found.row("4 busy loops", "both", f"{arguments.steady:g} s", "", "", dead)
    async with cluster(arguments.backend, "auto", FLAGS) as (_, client):
        local = await goes_local(client)
        found.row("kill -9", "prefill", f"auto: new request {'local' if local else 'not local'}", "", "", "")
    found.goal("kill_seen_p50_ms", statistics.median(kills), 100)
    found.goal("kill_seen_worst_ms", max(kills), 500)
    found.goal("stop_seen_worst_ms", max(stops), 3000)
    found.goal("survivors_exact_share", exact / of, 1, at_least=True)
    found.goal("others_unavailable_share", clear / 2, 1, at_least=True)
    found.goal("auto_goes_local", float(local), 1, at_least=True)
    found.goal("falsely_declared_dead", dead, 0)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["ray", "process"], default="ray")
    parser.add_argument("--parts", nargs="+", choices=["instances", "ranks"], default=["instances", "ranks"])
    parser.add_argument("--rank-rounds", type=at_least_one, default=1, help="kills and stops of each rank, each")
    parser.add_argument("--kills", type=at_least_one, default=20)
    parser.add_argument("--stops", type=at_least_one, default=4)
    parser.add_argument("--steady", type=float, default=60.0, help="seconds beside four busy loops")
    report.add_arguments(parser)
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    report.run(main)
