"""An instance of several ranks as plain processes on loopback, one per rank and one thread each, without a cluster."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import Role
from support.deployment import Running


@dataclass
class RankProcesses:
    """One instance; ``ranks[0]`` speaks for it."""

    name: str
    plan: ParallelPlan
    ranks: list[Running] = field(default_factory=list)

    @staticmethod
    def spawn(
        folder: Path, role: Role, plan: ParallelPlan, arguments: Sequence[str], *, command: Sequence[str] = ()
    ) -> "RankProcesses":
        """Start every rank with ``arguments``, of ``command`` (default: the worker's module); returns at once."""
        name = f"{role}-tp{plan.tp}-pp{plan.pp}"
        instance = RankProcesses(name, plan)
        environment = {**os.environ, "BIPHASE_RANK_KEY": secrets.token_hex(16)}
        leader = folder / f"{name}.rank0.json"
        for rank in range(plan.num_ranks):
            announce, log = folder / f"{name}.rank{rank}.json", folder / f"{name}.rank{rank}.log"
            flags = ["--name", name, "--announce", str(announce), "--log-file", str(log), "--threads", "1"]
            flags += ["--tp", str(plan.tp), "--pp", str(plan.pp), "--rank", str(rank), "--incarnation", "1"]
            flags += ["--leader", str(leader)] if rank else []
            with open(folder / f"{name}.rank{rank}.out", "wb") as output:
                process = subprocess.Popen(
                    [*(command or (sys.executable, "-m", f"biphase.{role}_worker")), *flags, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            instance.ranks.append(Running(f"{name} rank {rank}", process, announce, log))
        return instance

    def wait_ready(self) -> str:
        """Its address, once all ranks are ready."""
        return self.ranks[0].wait_ready().address

    def stop(self) -> None:
        """Ask rank 0, which tells the others; those that are left are ended."""
        if self.ranks[0].process.poll() is None:
            self.ranks[0].signal(signal.SIGTERM)
        for running in self.ranks:
            running.stop()
