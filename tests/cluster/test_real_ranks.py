"""Real ranks of a small real model under the process backend: what a lost one costs, and what it does not."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from support.dummy_directory import write_dummy_directory
from support.served import Served, is_ready, pid_of, rank_pids

from biphase.client import AsyncClient
from biphase.cluster.run_dir import started_ticks
from biphase.protos.errors import Internal, Unavailable

Serve = Callable[..., Served]
GONE_S = 5.0
"""Far above what bench/faults.py holds: other tests may keep this machine busy."""
PROMPT = list(range(10, 40))


async def stream(client: AsyncClient, max_tokens: int) -> list[int]:
    answer = client.generate(token_ids=PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [token async for delta in answer for token in delta.token_ids]


async def all_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + GONE_S
    while any(started_ticks(pid) is not None for pid in pids):
        assert time.monotonic() < deadline, "ranks are left"
        await asyncio.sleep(0.005)


async def test_a_lost_rank_ends_its_instance_and_no_other(serve: Serve, tmp_path: Path) -> None:
    model = write_dummy_directory(tmp_path / "model")
    plan = ("--prefill", "0", "--decode", "2", "--decode-tp", "2", "--threads", "1", "--kv-memory", "16MiB")
    served = serve("--model", str(model), "--load-format", "dummy", *plan, PYTHONPATH="")
    served.wait_ready()
    others = rank_pids(served, "decode-1", 1)
    assert len(others) == 2
    async with AsyncClient(served.record.router_address) as client:
        alone = await stream(client, 400)
        for life, (rank, number) in enumerate(((0, signal.SIGSTOP), (1, signal.SIGKILL)), 1):
            pids = rank_pids(served, "decode-0", life)
            busy = number == signal.SIGKILL
            streams = [asyncio.create_task(stream(client, 400)) for _ in range(4 if busy else 0)]
            if busy:
                await asyncio.sleep(0.3)  # into their steps, on both instances
            os.kill(pids[rank], number)
            await all_gone(pids)
            ended = await asyncio.gather(*streams, return_exceptions=True)
            assert all(tokens == alone or isinstance(tokens, (Internal, Unavailable)) for tokens in ended), ended
            assert not busy or alone in ended, "who was on the other instance noticed nothing"
            status = await asyncio.to_thread(served.wait_for, is_ready("decode-0", life + 1))
            assert pid_of(status, "decode-1") == others[0]
            assert await stream(client, 20) == alone[:20]
    assert all(started_ticks(pid) is not None for pid in others)
    log = (served.run_dir.logs / "controller-1.log").read_text()
    assert "rank 1: rank 0 has been silent" in log and "decode-0#2 is gone: rank " in log
