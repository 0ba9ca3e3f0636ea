"""The ranks of an instance as threads of this process, each with its own groups over loopback."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.store import join_store, open_store
from biphase.protos.parallel_plan import ParallelPlan

T = TypeVar("T")

HOST = "127.0.0.1"


def on_ranks(plan: ParallelPlan, work: Callable[[RankGroups], T], *, timeout_s: float = 20.0) -> list[T]:
    """``work`` on every rank at once; what it returned, by rank. Raises what the first rank that failed raised."""
    store, port = open_store(HOST, timeout_s=timeout_s)
    failed: list[BaseException] = []
    lock = threading.Lock()

    def run(rank: int) -> T:
        torch.set_num_threads(1)
        groups = None
        try:
            mine = store if rank == 0 else join_store(HOST, port, timeout_s=timeout_s)
            groups = RankGroups.join(
                plan,
                rank,
                store=mine,
                host=HOST,
                backend="gloo",
                timeout_s=timeout_s,
                join_timeout_s=timeout_s,
            )
            result = work(groups)
            groups.meet("the end")  # what was sent may not have been taken
            return result
        except BaseException as error:
            with lock:
                failed.append(error)
            raise
        finally:
            if groups is not None:
                groups.close()
                del groups

    with ThreadPoolExecutor(plan.num_ranks) as ranks:
        futures = [ranks.submit(run, rank) for rank in range(plan.num_ranks)]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]
