"""Everything one worker process is started with. Plain values; defaults live here and nowhere else."""

import math
import re
from dataclasses import dataclass, field, replace

from biphase.engine.config import EngineConfig
from biphase.protos.errors import SetupError
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleLimits:
    """How large the steps and the queue of a role may be."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        _in_range("max_num_seqs", self.max_num_seqs, 1, 65536)
        _in_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        if self.max_queued_tokens is not None:
            _in_range("max_queued_tokens", self.max_queued_tokens, 1, 2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One instance of one role. Raises SetupError, one line with value and bound, for what cannot be.

    ``host`` is listened on, ``advertise_host`` (default: host) is what others connect to; port 0 takes any free one.
    ``max_num_batched_tokens``: tokens per step, the prefill chunk's budget. ``max_queued_tokens`` (prefill; default
    two steps): what may wait here; a single longer prompt is taken when nothing waits. ``local_prefill_tokens``
    (decode): prompt tokens per step while others decode. ``other``: the limits in the other role, which an instance may turn
    into (default: the same). ``lease_s``: how long an abandoned ticket lives.
    ``pull_timeout_s``: how long a pull may go without progress. ``drain_s``: when asked to stop, how long what runs may take
    to end by itself.

    ``plan``, ``rank``: which part of the instance this process is. The ranks share ``rank_key``, 32 hex digits; rank 0
    listens for the others on ``rank_port`` of ``host``, they find it at ``leader`` (its address, or the file that it
    announces itself in) or as their starter tells them. ``join_timeout_s``: how long they wait for each other before
    anything is loaded, ``load_timeout_s``: until all have loaded; ``step_timeout_s``: how long a step may take before the instance is given up.

    ``kv_transport``, ``kv_codec``: how KV travels to and from here; without ``kv_overlap`` a prompt's leaves only when all
    of it is computed, for measuring; ``inject_faults``: what goes wrong on its way, for drills.
    """

    name: str
    role: Role
    incarnation: int
    host: str = "127.0.0.1"
    advertise_host: str = ""
    port: int = 0
    kv_port: int = 0
    engine: EngineConfig
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queued_tokens: int | None = None
    local_prefill_tokens: int = 128
    other: RoleLimits | None = None
    lease_s: float = 30.0
    pull_timeout_s: float = 60.0
    drain_s: float = 0.0
    log_file: str = ""
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    rank: int = 0
    rank_key: str = ""
    rank_port: int = 0
    leader: str = ""
    join_timeout_s: float = 120.0
    load_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    kv_transport: str = "auto"
    kv_codec: str = "raw"
    kv_overlap: bool = True
    inject_faults: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise SetupError("name is empty, an instance needs one")
        if self.host in ("", "0.0.0.0", "::") and not self.advertise_host:
            raise SetupError(f"host is {self.host or 'empty'}: others cannot connect to that, give an advertise_host")
        _in_range("incarnation", self.incarnation, 1, 2**64 - 1)
        _in_range("port", self.port, 0, 65535)
        _in_range("kv_port", self.kv_port, 0, 65535)
        _in_range("local_prefill_tokens", self.local_prefill_tokens, 1, 2**20)
        _ = self.own_limits  # which checks them
        if not (math.isfinite(self.drain_s) and self.drain_s >= 0):
            raise SetupError(f"drain_s is {self.drain_s}, it must be a number from 0 up")
        for name in ("lease_s", "pull_timeout_s", "join_timeout_s", "load_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SetupError(f"{name} is {value}, it must be above 0")
        _in_range("rank_port", self.rank_port, 0, 65535)
        _in_range("rank", self.rank, 0, self.plan.num_ranks - 1)
        if self.plan.num_ranks > 1 and re.fullmatch(r"[0-9a-f]{32}", self.rank_key) is None:
            raise SetupError(
                f"rank_key has {len(self.rank_key)} characters, the ranks of {self.plan} share 32 hex digits"
            )

    @property
    def queue_tokens(self) -> int:
        return 2 * self.max_num_batched_tokens if self.max_queued_tokens is None else self.max_queued_tokens

    @property
    def rank_host(self) -> str:
        """The address of this machine that other ranks connect to."""
        return self.advertise_host if self.host in ("", "0.0.0.0", "::") else self.host

    @property
    def step_engine(self) -> EngineConfig:
        """The engine, made for the largest step that a scheduler of either role plans."""
        of_roles = [self.own_limits, self.other or self.own_limits]
        most_seqs = max(limits.max_num_seqs for limits in of_roles)
        most_tokens = max(
            limits.max_num_seqs + max(limits.max_num_batched_tokens, self.local_prefill_tokens) for limits in of_roles
        )
        return replace(self.engine, max_step_tokens=most_tokens, max_step_seqs=most_seqs)

    @property
    def own_limits(self) -> RoleLimits:
        return RoleLimits(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_queued_tokens=self.max_queued_tokens,
        )

    def as_role(self, role: Role, incarnation: int) -> "WorkerConfig":
        """The same instance in another life, in its own role or the other one."""
        if role == self.role:
            return replace(self, incarnation=incarnation)
        limits = self.other or self.own_limits
        return replace(
            self,
            role=role,
            incarnation=incarnation,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_queued_tokens=limits.max_queued_tokens,
            other=self.own_limits,
        )

    def address(self, port: int) -> str:
        """How others reach a port of this instance."""
        host = self.advertise_host or self.host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SetupError(f"{name} is {value}, it must be from {low} to {high}")
