"""What a decode in the same process feels of a pull: the gaps between the ends of its steps."""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Sequence

import report
from handoff_ends import SMOLLM2, Choice, child, plane_of, signature, tokens_of, transport_of

from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.puller import KvPuller, PullResult
from biphase.protos.ids import BlockId, Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import KvTicket, Sampling

MEGABYTES = 256
DECODE_SEQS = 4
DECODE_CONTEXT = 256


async def measure_decode(result: report.Report, rounds: int, transports: Sequence[str] = ("grpc", "shm")) -> None:
    for transport in transports:
        await _measure(result, rounds, transport)


async def _measure(result: report.Report, rounds: int, transport: str) -> None:
    from biphase.engine.config import EngineConfig
    from biphase.engine.engine_thread import EngineThread
    from biphase.engine.step import SeqStep, StepPlan

    num_tokens = tokens_of(SMOLLM2, MEGABYTES)
    pull_blocks = SMOLLM2.blocks_for(num_tokens)
    seq_blocks = SMOLLM2.blocks_for(2048)
    config = EngineConfig(
        model="smollm2",
        block_size=SMOLLM2.block_size,
        max_model_len=2048,
        num_kv_blocks=pull_blocks + DECODE_SEQS * seq_blocks,
        threads=1,
    )
    thread = EngineThread(config)
    engine = await thread.load(lambda _detail, _done: None)
    tables = [[BlockId(pull_blocks + seq * seq_blocks + at) for at in range(seq_blocks)] for seq in range(DECODE_SEQS)]
    greedy = Sampling(max_tokens=1 << 20, ignore_eos=True)

    def plan(start: int, token_ids: Sequence[Sequence[int]]) -> StepPlan:
        return StepPlan(
            seqs=tuple(
                SeqStep(
                    seq_id=SeqId(seq), token_ids=tuple(ids), start=start, blocks=tuple(tables[seq]), sampling=greedy
                )
                for seq, ids in enumerate(token_ids)
            )
        )

    context = DECODE_CONTEXT
    prompts = [[100 + seq + at % 1000 for at in range(context)] for seq in range(DECODE_SEQS)]
    tokens = (await thread.run(plan(0, prompts))).tokens
    ends: list[tuple[float, bool]] = []
    planes = {transport: plane_of(transport)} if transport not in ("grpc", "tcp") else {}
    puller = KvPuller(
        memory=engine.kv_memory,
        signature=signature("decode-bench", SMOLLM2, ParallelPlan()),
        transports=[GrpcTransport()] if transport == "grpc" else [GrpcTransport(), transport_of(transport, planes)],
        choose=lambda ours, theirs: [Choice(transport)],
        decoding=lambda: True,
    )
    pulling: asyncio.Task[PullResult] | None = None
    pulled: list[PullResult] = []

    async def steps(count: int) -> None:
        """``count`` steps, or without a count for as long as the pull runs."""
        nonlocal context, tokens
        done = 0
        while done < count or (pulling is not None and not pulling.done()):
            tokens = (await thread.run(plan(context, [[int(token or 0)] for token in tokens]))).tokens
            context = context + 1 if context < 2000 else DECODE_CONTEXT
            ends.append((time.perf_counter(), pulling is not None))
            done += 1

    blocks = [BlockId(block) for block in range(pull_blocks)]
    of_source = {"layout": "smollm2", "plan": [1, 1], "rank": 0, "num_blocks": pull_blocks, "ring": []}
    async with child(source={**of_source, "planes": list(planes)}) as there:
        endpoint = (await there.told())["endpoint"]
        await there.ask(do="endpoints", endpoints=[endpoint])
        for _ in range(rounds):
            await steps(20)
            ticket = KvTicket(
                id=TicketId(os.urandom(16)),
                kv_address=endpoint["grpc"],
                instance=InstanceName("prefill-bench"),
                incarnation=Incarnation(1),
                num_tokens=num_tokens,
            )
            await there.ask(do="ticket", ticket=ticket.id, tokens=num_tokens)
            pulling = asyncio.create_task(puller.pull(ticket, 1, blocks, timeout_s=60.0))
            await steps(0)
            pulled.append(await pulling)
            await steps(1)
            pulling = None
        await puller.close()
        for plane in planes.values():
            await plane.close()
    await thread.close()
    ends = ends[20:]  # the first steps warm up
    gaps = [((after - before) * 1e3, during) for (before, _), (after, during) in itertools.pairwise(ends)]
    alone = [gap for gap, during in gaps if not during]
    under = [gap for gap, during in gaps if during]
    median = statistics.median(alone)
    rate = statistics.median(each.bytes / each.ms / 1e6 for each in pulled)
    pull_ms = statistics.median(each.ms for each in pulled)
    alone_note = f"median gap {median:.2f} ms, most {max(alone):.2f}, {DECODE_SEQS} requests, 1 thread"
    under_note = f"median gap {statistics.median(under):.2f} ms, most {max(under):.2f}, {len(under)} steps"
    result.row(MEGABYTES, "decode alone", "", "", "", median, "", alone_note)
    result.row(MEGABYTES, f"decode under pulls by {transport}", rate, "", "", pull_ms, "", under_note)
    result.goal(f"decode_gap_max_of_median_{transport}", max(under) / median, 3.0)
    result.extra.setdefault("decode", {})[transport] = {
        "alone_ms": alone,
        "under_pull_ms": under,
        "pull_ms": [each.ms for each in pulled],
    }
