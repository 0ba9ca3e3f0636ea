"""What a rank exchanges with others inside a step: sums over the places of its stage, activations between stages.

torch.distributed throughout, nccl on GPUs and gloo elsewhere, in groups of this instance's own: torch's default group is
not used, so that several instances can live in one process. Everything here is called in the engine thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from biphase.engine.parallel.pipe import Pipe
from biphase.engine.parallel.store import JOIN_TIMEOUT_S, meet
from biphase.engine.parallel.tensor_group import TensorGroup
from biphase.protos.errors import SetupError, one_line
from biphase.protos.parallel_plan import ParallelPlan

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroups:
    """A rank's ends: ``tp`` None with one place, ``previous`` and ``next`` None at the ends of the pipeline."""

    plan: ParallelPlan
    rank: int
    tp: TensorGroup | None
    previous: Pipe | None
    next: Pipe | None
    store: Store
    join_timeout_s: float

    @staticmethod
    def join(
        plan: ParallelPlan,
        rank: int,
        *,
        store: Store,
        host: str,
        backend: Backend,
        timeout_s: float,
        join_timeout_s: float = JOIN_TIMEOUT_S,
        device: torch.device | None = None,
        on_wait: Callable[[str], None] = lambda line: None,
    ) -> "RankGroups":
        """Connect to the ranks that this one talks to; returns when they have done so.

        ``host``: the address of this machine that gloo listens on. ``timeout_s``: of a step, hence of every exchange in
        one. ``device``: the GPU of nccl. ``on_wait`` hears for whom we wait. Raises SetupError when another rank does not come.
        """
        stage, place = plan.stage_of(rank), plan.place_of(rank)
        meet(store, "joined", rank, plan.num_ranks, join_timeout_s, on_wait)

        def group(name: str, member: int, size: int) -> Any:
            return _group(
                PrefixStore(name, store), member, size, host=host, backend=backend, timeout_s=timeout_s, device=device
            )

        # every rank makes its groups in the order of the pipeline, so that none waits for one that waits for it
        with _joining(rank):
            tp = group(f"tp/{stage}", place, plan.tp) if plan.tp > 1 else None
            before = group(f"pipe/{stage}/{place}", 1, 2) if stage > 0 else None
            after = group(f"pipe/{stage + 1}/{place}", 0, 2) if stage + 1 < plan.pp else None
        return RankGroups(
            plan=plan,
            rank=rank,
            tp=None if tp is None else TensorGroup(tp, direct=backend == "gloo"),
            previous=None if before is None else Pipe(before, peer=0),
            next=None if after is None else Pipe(after, peer=1),
            store=store,
            join_timeout_s=join_timeout_s,
        )

    @property
    def samples(self) -> bool:
        """Whether this rank says what was drawn."""
        return self.rank == self.plan.rank_at(stage=self.plan.pp - 1, place=0)

    def meet(self, name: str, on_wait: Callable[[str], None] = lambda line: None) -> None:
        """Wait until every rank has come to ``name``, each name once; loading may take some much longer than others.
        ``on_wait`` hears for whom we wait. Raises SetupError naming who did not come in time."""
        meet(self.store, name, self.rank, self.plan.num_ranks, self.join_timeout_s, on_wait)

    def close(self) -> None:
        """Drop the connections, for good: what still waits for this rank fails at once."""
        for end in (self.tp, self.previous, self.next):
            if end is not None:
                end.close()


@contextmanager
def _joining(rank: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise SetupError(f"rank {rank} could not connect to its neighbours: {one_line(error)}") from error


def _group(
    store: Store, member: int, size: int, *, host: str, backend: Backend, timeout_s: float, device: torch.device | None
) -> Any:
    """A process group of torch; both kinds take the same calls."""
    timeout = timedelta(seconds=timeout_s)
    if backend == "nccl":
        from torch.distributed import ProcessGroupNCCL

        of_nccl = ProcessGroupNCCL.Options()
        of_nccl._timeout = timeout
        if device is not None:
            torch.cuda.set_device(device)
        # it connects in the warming up, at its first exchange: before a graph is captured
        return ProcessGroupNCCL(store, member, size, of_nccl)
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # gloo would look up the host's own name, which may be no address of this machine
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 1
    return ProcessGroupGloo(store, member, size, options)
