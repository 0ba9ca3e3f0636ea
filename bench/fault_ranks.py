"""One rank of a tp 2 x pp 2 instance is killed or stopped: how soon all of it is gone, and that nobody else notices.

Two decode instances of four ranks each and a prefill instance of one serve a small random Llama. Each rank of decode-0 is
hit in turn, idle and in the steps of streams that run on both. The instance must be gone as a whole and come back; streams
on decode-1 must go on exactly, and decode-1 and the prefill instance must be the same processes as before.
"""

import asyncio
import os
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import report
from fault_cluster import Cluster, cluster, instance, start_stream, until, wait_back

from biphase.client import AsyncClient
from biphase.protos.errors import InvalidRequest

PROMPT = [3 + position * 37 % 500 for position in range(40)]
STREAMS, TOKENS = 4, 200
RANKS = 4
FLAGS = ("--cpus", "0", "--prefill", "1", "--decode", "2", "--decode-tp", "2", "--decode-pp", "2")
GONE_WITHIN_S = 10.0
STEADY_S = 10.5
"""An instance that was ready for ten seconds is started again at once; one that dies sooner waits longer each time."""
OTHERS = ("prefill-0", "decode-1", "router-0", "controller")


@dataclass
class Seen:
    """What was found over all faults."""

    kill_ms: list[float] = field(default_factory=list)
    stop_ms: list[float] = field(default_factory=list)
    streams: int = 0
    """In flight when a rank was hit."""
    exact: int = 0
    """Those that went on to their end, every token right."""
    wrong: int = 0
    """Those that ended in order with another token, or with an error that blames the request."""
    noticed: int = 0
    """Other processes that were not the same afterwards."""
    failed_after: int = 0
    """First requests after a rebuild that gave anything else than before it."""


async def measure_ranks(backend: str, rounds: int, folder: Path, found: report.Report) -> None:
    """Rows and goals of this part."""
    model = _write_model(folder)
    seen = Seen()
    faults = [("kill -9", signal.SIGKILL, seen.kill_ms), ("SIGSTOP", signal.SIGSTOP, seen.stop_ms)]
    async with cluster(backend, "strict", ("--model", str(model), "--kv-memory", "32MiB", *FLAGS)) as (running, client):
        alone = (await start_stream(client, PROMPT, TOKENS).task).tokens
        ready_at = time.monotonic()
        for label, number, times in faults * rounds:
            for rank in range(RANKS):
                for busy in (False, True):
                    await asyncio.sleep(max(0.0, ready_at + STEADY_S - time.monotonic()))
                    gone_ms, back_s, ended = await _one_fault(
                        running, client, rank, number, alone if busy else None, seen
                    )
                    ready_at = time.monotonic()
                    times.append(gone_ms)
                    after = await start_stream(client, PROMPT, TOKENS).task
                    seen.failed_after += after.error is not None or after.tokens != alone
                    where = f"rank {rank} of tp 2 x pp 2, {'in a step' if busy else 'idle'}"
                    found.row(label, "decode", where, gone_ms, back_s, ended)
                    print(
                        f"{label} {where}: gone after {gone_ms:.0f} ms, back after {back_s:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    found.goal("rank_kill_gone_worst_ms", max(seen.kill_ms), 1000)
    found.goal("rank_stop_gone_worst_ms", max(seen.stop_ms), 3000)
    found.goal("rank_others_noticed", seen.noticed, 0)
    found.goal("rank_streams_wrong", seen.wrong, 0)
    found.goal("rank_streams_elsewhere_exact", seen.exact, 1, at_least=True)
    found.goal("rank_requests_failed_after", seen.failed_after, 0)
    found.extra["rank_streams_in_flight"] = seen.streams


async def _one_fault(
    running: Cluster, client: AsyncClient, rank: int, number: signal.Signals, alone: list[int] | None, seen: Seen
) -> tuple[float, float, int]:
    """(ms until the last rank was gone, s until the instance serves again, streams that ended with it)."""

    async def all_are_known() -> bool:  # under Ray each rank says its own in its own time
        found = await asyncio.to_thread(running.processes)
        return all(len(found[name]["rank_pids"]) == RANKS for name in ("decode-0", "decode-1"))

    await until(seconds=60, check=all_are_known)
    before = await asyncio.to_thread(running.processes)
    _, incarnation, _ = await instance(client, "decode-0")
    pids = before["decode-0"]["rank_pids"]
    descriptors = [os.pidfd_open(pid) for pid in pids]
    streams = [start_stream(client, PROMPT, TOKENS) for _ in range(STREAMS)] if alone else []

    async def all_run() -> bool:
        return all(len(stream.tokens) >= 3 for stream in streams)

    await until(seconds=60, check=all_run)
    hit_at = time.monotonic()
    os.kill(pids[rank], number)
    gone_at = await asyncio.to_thread(_all_gone, descriptors, hit_at + GONE_WITHIN_S)
    await wait_back(client, "decode-0", incarnation)
    back_s = time.monotonic() - hit_at
    ended = 0
    for outcome in [await stream.task for stream in streams]:
        ended += outcome.error is not None
        seen.exact += outcome.error is None and outcome.tokens == alone
        seen.wrong += outcome.error is None and outcome.tokens != alone
        seen.wrong += isinstance(outcome.error, InvalidRequest)
    seen.streams += len(streams)
    after = await asyncio.to_thread(running.processes)
    facts = ("pid", "rank_pids", "incarnation", "state")
    seen.noticed += sum(any(before[name][fact] != after[name][fact] for fact in facts) for name in OTHERS)
    return 1000 * (gone_at - hit_at), back_s, ended


def _all_gone(descriptors: list[int], deadline: float) -> float:
    """When the last of the processes was seen gone."""
    left = list(descriptors)
    while left:
        gone, _, _ = select.select(left, [], [], max(0.0, deadline - time.monotonic()))
        if not gone:
            raise AssertionError(f"{len(left)} of {len(descriptors)} ranks are left after {GONE_WITHIN_S:g} s")
        for descriptor in gone:
            left.remove(descriptor)
            os.close(descriptor)
    return time.monotonic()


def _write_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.dummy_directory import write_tokenizer
    from support.random_llama import write_random_llama

    write_random_llama(folder)
    write_tokenizer(folder)
    return folder
