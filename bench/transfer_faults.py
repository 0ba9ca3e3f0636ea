"""Thousands of transfers under random faults: no wrong byte, none hangs past its deadline, nothing leaks.

    python bench/transfer_faults.py [--transport grpc,tcp,shm,dist] [--transfers 10000] [--seed 7] [--json FILE] [--check]

Two processes. The source serves tickets of up to 256 KiB over one wire at a time, its frames struck by drops, delays,
corruption, duplicates, cuts, reordering, stalls and disconnects (kvtransfer/faults.py). Only pieces and trailers
are struck, and only those count: a beat that is lost or late is no fault. The reader pulls 16 at a time, each within half a
second, every other one with a second wire to go on by when the first breaks; whatever a pull's outcome, its blocks are at once somebody else's, so a byte written after the
end would be found. Every fourth ticket is still being computed when it is pulled. dist has a fifth of the transfers: a
group of two processes that was lost has to be built again.

    wrong bytes    of completed transfers, digest and token 0 beside the source's; of all blocks at rest, poison
    late           transfers that ended more than --grace-ms after their deadline, not counting what this process was
                   itself held up meanwhile (a task that only sleeps tells)
    least of a kind  strikes of the kind that struck least, on pieces and trailers; pieces are to be the bulk of every kind
    leaked         after everything is closed: blocks, tickets, pulls, sends, slots, tasks, file descriptors of either end,
                   over what there was before the first fault
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import report
import xxhash
from transfer_faults_source import LAYOUT, MOST_TOKENS, held_by_process, make_plane, make_signature

from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer import peers
from biphase.kvtransfer.faults import KINDS
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.signature import RankEndpoint
from biphase.kvtransfer.tcp.source import TcpTransport
from biphase.kvtransfer.wire import DataPlane, Transport
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import BlockId, Incarnation, InstanceName, TicketId
from biphase.protos.values import KvTicket

AT_A_TIME = 16
TRANSPORTS = ("grpc", "tcp", "shm", "dist")
SECOND = {"grpc": "tcp", "tcp": "grpc", "shm": "tcp", "dist": "tcp"}
"""Where every other pull goes on when its wire breaks."""

RATES = dict.fromkeys(KINDS, 0.017) | {"stall": 0.016, "reorder": 0.022}
"""Per piece or trailer. Reordering strikes none that follows one that is held back."""

MORE = {"tcp": 0.5}
"""Times so much: what is sent from the pool's own memory goes by single blocks, and has three times the frames."""

SETTLE_S = {"grpc": 1.0, "tcp": 1.0, "shm": 1.0, "dist": 15.0}
"""After everything was closed. A pair group that was being built ends in a thread of its own, within its 10 s."""

_FDS_PER_PAIR = 2
"""Of a pair group that dist keeps for a reader, up to eight of them, until another takes its place."""

_BEAT_S = 0.01
_WARM_UP = 32
_WARM_UP_DEADLINE_S = 10.0
_POISON = np.float32(-77777.0)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    name: str
    reason: str = "the one that is measured"


@dataclass(kw_only=True)
class Tally:
    """What came of the transfers of one wire."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    late: int = 0
    longest_s: float = 0.0
    seconds: float = 0.0


class HeldUp:
    """How long this loop has been held up in all: by how much short sleeps were too long."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(_BEAT_S)
            self.seconds += max(0.0, time.monotonic() - began_s - 2 * _BEAT_S)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


class Source:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self._turn = asyncio.Lock()
        self.address = address

    async def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        async with self._turn:
            self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the source has ended with code {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def running_source(transport: str, spec: str, num_blocks: int) -> AsyncIterator[Source]:
    program = str(Path(__file__).with_name("transfer_faults_source.py"))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, transport, spec, str(num_blocks), stdin=pipe, stdout=pipe
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"the source has ended with code {await process.wait()}")
        yield Source(process, json.loads(line)["grpc"])
        process.stdin.close()
        async with asyncio.timeout(10.0):
            code = await process.wait()
        if code:
            raise RuntimeError(f"the source has ended with code {code}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Reader:
    """This process: a pool whose free blocks hold poison, and a puller over one wire."""

    def __init__(self, transport: str, num_blocks: int, deadline_s: float, grace_s: float) -> None:
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._held_up = HeldUp()
        self._pool = np.full(LAYOUT.pool_shape(num_blocks), _POISON, dtype=np.float32)
        self._memory = CpuKvMemory(self._pool, LAYOUT)
        self._free = [BlockId(block) for block in range(num_blocks)]
        self._plane: DataPlane | None = make_plane(transport)
        self._pullers = [self._make_puller([transport]), self._make_puller([transport, SECOND[transport]])]
        self.tally = Tally()

    def _make_puller(self, routes: list[str]) -> KvPuller:
        transports: list[Transport] = [GrpcTransport(), TcpTransport()]
        if self._plane is not None:
            transports.append(TcpTransport(self._plane))
        return KvPuller(
            memory=self._memory,
            signature=make_signature("reader", (RankEndpoint(transports=TRANSPORTS),)),
            transports=transports,
            choose=lambda _ours, _theirs: [Chosen(name=route) for route in routes],
        )

    @property
    def fallbacks(self) -> int:
        return sum(puller.counters()["fallbacks"] for puller in self._pullers)

    async def transfer(self, source: Source, num_tokens: int, late_s: float, *, second: bool) -> None:
        """Open one ticket and pull it, with a second wire to fall back on or without; count what came of it."""
        tally = self.tally
        opened = await source.ask("open", tokens=num_tokens, late_s=late_s)
        ticket = KvTicket(
            id=TicketId(bytes.fromhex(opened["id"])),
            kv_address=source.address,
            instance=InstanceName("source"),
            incarnation=Incarnation(1),
            num_tokens=num_tokens,
        )
        blocks = [self._free.pop() for _ in range(LAYOUT.blocks_for(num_tokens))]
        self._expect_poison(blocks)
        began_s, held_up_s = time.monotonic(), self._held_up.seconds
        try:
            async with asyncio.timeout(self._deadline_s):
                pulled = await self._pullers[second].pull(ticket, 1, blocks, timeout_s=self._deadline_s)
            outcome = "done"
        except HandoffFailed as error:
            outcome = "failed"
            tally.reasons[str(error).partition("KV: ")[2][:80] or str(error)[:80]] += 1
        except TimeoutError:
            outcome = "deadline"
        took_s = time.monotonic() - began_s
        tally.outcomes[outcome] += 1
        tally.longest_s = max(tally.longest_s, took_s)
        if took_s > self._deadline_s + self._grace_s:
            await asyncio.sleep(2 * _BEAT_S)  # let the beat that was held up tell
            tally.late += took_s - (self._held_up.seconds - held_up_s) > self._deadline_s + self._grace_s
        if outcome == "done":
            data = bytearray(LAYOUT.box(num_tokens).num_bytes(LAYOUT))
            self._memory.pack(blocks, LAYOUT.box(num_tokens), data)
            right = xxhash.xxh3_128_hexdigest(data) == opened["content"] and pulled.first_token == opened["first_token"]
            tally.wrong += not right
        else:
            await source.ask("revoke", id=opened["id"])
        self._pool[:, blocks] = _POISON
        self._free[:0] = blocks

    def _expect_poison(self, blocks: list[BlockId]) -> None:
        """Nobody has written since they were given back."""
        if not (self._pool[:, blocks] == _POISON).all():
            self.tally.wrong += 1
            self._pool[:, blocks] = _POISON

    async def close(self) -> dict[str, int]:
        """What it still holds."""
        await self._held_up.stop()
        open_pulls = 0
        for puller in self._pullers:
            open_pulls += puller.counters()["open_pulls"]
            await puller.close()
        if self._plane is not None:
            await self._plane.close()
        self._expect_poison(self._free)
        return {"open_pulls": open_pulls, "blocks": len(self._pool[0]) - len(self._free)}


def _length(rng: random.Random) -> int:
    """Three of four in the upper half: they have several pieces."""
    return rng.randint(MOST_TOKENS // 2 if rng.random() < 0.75 else 1, MOST_TOKENS)


async def run_transfers(reader: Reader, source: Source, count: int, rng: random.Random) -> None:
    began_s = time.monotonic()
    left = iter(range(count))

    async def worker() -> None:
        for number in left:
            await reader.transfer(source, _length(rng), 0.02 if number % 4 == 3 else 0.0, second=number % 2 == 0)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_A_TIME):
            group.create_task(worker())
    reader.tally.seconds = time.monotonic() - began_s


def spec_of(transport: str, deadline_s: float, seed: int) -> str:
    """The faults of a campaign. A stall outlasts the deadline."""
    times = {"delay": ":20ms", "stall": f":{deadline_s * 1.4e3:g}ms"}
    parts = [f"{kind}={rate * MORE.get(transport, 1.0):g}{times.get(kind, '')}" for kind, rate in RATES.items()]
    return ",".join([*parts, f"seed={seed}"])


async def campaign(
    result: report.Report, transport: str, count: int, *, seed: int, deadline_s: float, grace_s: float
) -> None:
    num_blocks = LAYOUT.blocks_for(MOST_TOKENS) * AT_A_TIME * 2
    async with running_source(transport, spec_of(transport, deadline_s, seed), num_blocks) as source:
        warm = Reader(transport, num_blocks, _WARM_UP_DEADLINE_S, grace_s)
        await run_transfers(warm, source, _WARM_UP, random.Random(seed))
        if warm.tally.outcomes["done"] != _WARM_UP or warm.tally.wrong:
            raise RuntimeError(f"{transport} without faults: {dict(warm.tally.outcomes)}, {dict(warm.tally.reasons)}")
        await warm.close()
        del warm
        state = await source.ask("settle")
        before, kept = {"source": state["process"], "reader": held_by_process()}, state["plane"].get("dist_pairs", 0)
        await source.ask("faults", on=True)
        reader = Reader(transport, num_blocks, deadline_s, grace_s)
        await run_transfers(reader, source, count, random.Random(seed + 1))
        held, tally = {"reader": await reader.close()}, reader.tally
        fallbacks = reader.fallbacks
        del reader  # a closed plane goes with its last reference
        until_s = time.monotonic() + SETTLE_S[transport]
        while True:
            state = await source.ask("settle")
            held["source"] = state["held"]
            after = {"source": state["process"], "reader": held_by_process()}
            for side, process in after.items():
                held[side] |= {name: max(0, process[name] - before[side][name]) for name in ("fds", "tasks")}
            more = state["plane"].get("dist_pairs", 0) - kept
            held["source"]["fds"] = max(0, held["source"]["fds"] - _FDS_PER_PAIR * more)
            if not any(sum(each.values()) for each in held.values()) or time.monotonic() > until_s:
                break
            await asyncio.sleep(0.2)
    leaked = sum(sum(each.values()) for each in held.values())
    faults, by_frame = state["faults"], state["by_frame"]
    result.row(
        transport,
        count,
        *(tally.outcomes[outcome] for outcome in ("done", "failed", "deadline")),
        tally.wrong,
        tally.late,
        leaked,
        fallbacks,
        round(tally.longest_s * 1e3),
        round(tally.seconds, 1),
        *(f"{by_frame['piece'][kind]}+{by_frame['trailer'][kind]}" for kind in KINDS),
    )
    print(*result.rows[-1], flush=True)
    name = transport
    result.goal(f"{name}_wrong", tally.wrong, 0)
    result.goal(f"{name}_late", tally.late, 0)
    result.goal(f"{name}_leaked", leaked, 0)
    result.goal(f"{name}_done_share", tally.outcomes["done"] / count, 0.5, at_least=True)
    result.goal(f"{name}_least_of_a_kind", min(faults.values()), count / 20, at_least=True)
    shares = [by_frame["piece"][kind] / max(1, faults[kind]) for kind in KINDS]
    result.goal(f"{name}_least_share_of_pieces", min(shares), 0.5, at_least=True)
    result.goal(f"{name}_fallbacks", fallbacks, count / 100, at_least=True)
    result.extra.setdefault("wires", {})[transport] = {
        "faults": faults,
        "by_frame": by_frame,
        "frames": state["frames"],
        "held": held,
        "before": before,
        "after": after,
        "reasons": tally.reasons.most_common(20),
        "leases_expired": state["expired"],
        "plane": state["plane"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default=",".join(TRANSPORTS), help="which, separated by commas (default all)")
    parser.add_argument("--transfers", type=int, default=10_000, help="per wire, of dist a fifth (default 10000)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--deadline-ms", type=float, default=500.0, help="of a transfer (default 500)")
    parser.add_argument(
        "--grace-ms", type=float, default=250.0, help="of a deadline; the machine is shared (default 250)"
    )
    report.add_arguments(parser)
    arguments = parser.parse_args()
    transports = arguments.transport.split(",")
    for transport in transports:
        if transport not in TRANSPORTS:
            parser.error(f"transport {transport!r} is none of {', '.join(TRANSPORTS)}")
    if arguments.transfers < 1:
        parser.error(f"--transfers is {arguments.transfers}, it must be at least 1")
    logging.basicConfig(level=logging.CRITICAL)
    peers.AVOID_S = (0.0, 0.0)  # every pull begins with the wire that is measured, however often that has failed
    columns = ["wire", "transfers", "done", "failed", "deadline", "wrong", "late", "leaked"]
    columns += ["fell back", "longest ms", "s", *(f"{kind}, pieces + trailers" for kind in KINDS)]
    result = report.Report("transfer_faults", columns)
    began_s = time.monotonic()
    for transport in transports:
        count = max(1, arguments.transfers // 5) if transport == "dist" else arguments.transfers
        deadline_s, grace_s = arguments.deadline_ms / 1e3, arguments.grace_ms / 1e3
        asyncio.run(campaign(result, transport, count, seed=arguments.seed, deadline_s=deadline_s, grace_s=grace_s))
        result.write(arguments)
    result.goal("minutes", (time.monotonic() - began_s) / 60, 20)
    return result.finish(arguments)


if __name__ == "__main__":
    report.run(main)
