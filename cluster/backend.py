"""What a backend must do: start, watch, stop and kill the processes of one deployment, and find them again.

Two implementations: ``process_backend`` (plain processes on this host) and ``ray_backend`` (Ray actors). The supervisor
and the controller know only this protocol. A process is told apart by its name and its incarnation.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from biphase.cluster.deployment import Deployment
from biphase.cluster.log_source import LogSource
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.process import Announcement
from biphase.protos.values import Role

Kind = Literal["prefill", "decode", "router", "controller"]
CONTROLLER: Literal["controller"] = "controller"
WAIT_VARIABLE = "BIPHASE_WAIT_FOR_NODES"
"""Set by `biphase serve --wait`: hosts join later, so what does not fit those that are there is no reason to refuse."""
STATE = "state"
"""The key of what the controller wants and knows; its events have others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One life of one process: all it needs to start on any host.

    An instance of several ranks has one spec, from which its backend makes each rank's: ``rank``, ``rank_key``,
    ``leader`` and the GPU in ``env`` are filled in there.
    """

    name: str
    kind: Kind
    incarnation: int
    deployment: Deployment
    run_dir: str
    controller_address: str
    host: str = "127.0.0.1"
    """Where an instance listens; empty: at the own address of its host, which a cluster of several hosts needs."""
    cpus: float = 0.0
    """CPUs each rank asks the placing backend for."""
    gpus: float | None = None
    """GPUs that its plan asks for; a backend that starts it fills in the share that each rank gets (0: none)."""
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    rank: int = 0
    rank_key: str = ""
    """The secret that the ranks of one life share, 32 hex digits; empty for a single one."""
    leader: str = ""
    """The file in which rank 0 announces its address, where ranks share a file system."""
    env: tuple[tuple[str, str], ...] = ()
    """The BIPHASE_* variables of the user's shell."""
    avoid_nodes: tuple[str, ...] = ()
    """Hosts, by the names their processes announce, that get no instance: cordoned, or not reached a moment ago."""

    @property
    def log_file(self) -> Path:
        rank = f".rank{self.rank}" if self.rank else ""
        return Path(self.run_dir) / "logs" / f"{self.name}-{self.incarnation}{rank}.log"

    def to_json(self) -> str:
        values = {**asdict(self), "deployment": self.deployment.to_json(), "env": dict(self.env)}
        return json.dumps(values)

    @staticmethod
    def from_json(text: str) -> "ProcessSpec":
        values = json.loads(text)
        values["deployment"] = Deployment.from_json(values["deployment"])
        values["plan"] = ParallelPlan(**values["plan"])
        values["env"] = tuple(values["env"].items())
        values["avoid_nodes"] = tuple(values["avoid_nodes"])
        return ProcessSpec(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A host as people and the controller see it."""

    name: str
    refused: str = ""
    """Why it gets no instance; empty: it may."""
    what: str = ""
    takes: tuple[Kind, ...] = ()
    """Roles whose instances, or stages of them, it is large enough for and may get."""
    remark: str = ""
    """What the deployment's placement does not have its way with there."""


class Handle(Protocol):
    """A process, or an instance with all its ranks, that was started or found again."""

    name: str
    kind: Kind
    incarnation: int
    end: str | None
    """Why it ended, e.g. ``killed by SIGKILL``; None while any of its ranks runs."""

    @property
    def pid(self) -> int:
        """Of rank 0; 0 until known."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all ranks."""
        ...

    async def ended(self) -> str:
        """Wait until all of it is gone and return why."""
        ...


class Backend(Protocol):
    """Starts and ends processes; decides nothing."""

    kill_patience_s: float | None
    """A process that was killed and is not seen gone after this is on a host that cannot be reached, and the next life
    starts elsewhere. None: every host can be reached."""

    @property
    def hosts_may_join(self) -> bool:
        """Hosts come and go: the controller starts everything, once there is a place for it."""
        ...

    async def open(self) -> None:
        """Connect to what places processes. Raises SetupError."""
        ...

    async def own_address(self) -> str:
        """Where others of the cluster reach what runs on this host."""
        ...

    async def nodes(self) -> list[NodeView]:
        """The hosts as last seen, read every few seconds; none where there is one for good."""
        ...

    @property
    def can_grow(self) -> bool:
        """Whether somebody brings hosts that are asked for."""
        ...

    async def idle(self, spec: ProcessSpec) -> int:
        """How many more instances like this one would find room now; what a request holds is not free."""
        ...

    async def ask_node(self, spec: ProcessSpec) -> str:
        """Ask for a host that ``spec`` fits on, one for its role at a time and until that is withdrawn, over all lives of
        the controller. Returns why nobody can bring one, empty where somebody may."""
        ...

    async def withdraw_node(self, role: Role) -> None:
        """Ask no more for a host for that role; the room of one that has come is free again."""
        ...

    async def node_came(self, spec: ProcessSpec) -> bool | None:
        """Whether the host that was asked for with a spec of that role is there, its room held; None: none is asked for."""
        ...

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None:
        """Raise SetupError with both numbers, asked and there, when ``specs`` do not fit.

        ``emptied``: they start one after the other, each once the lives that stand there by its name have ended: what
        those hold, or would hold by an earlier one of ``specs``, is free then.
        """
        ...

    async def check_nodes(self, deployment: Deployment) -> list[str]:
        """Why hosts cannot serve ``deployment``, one line for each. SetupError where no host can."""
        ...

    def check_for(self, deployments: Sequence[Deployment]) -> None:
        """From now on hosts that join are checked for these, the first of them being the one that is wanted."""
        ...

    async def start(self, spec: ProcessSpec) -> Handle:
        """Start a process, or all ranks of an instance, and return at once; announcements tell the rest. SetupError."""
        ...

    async def adopt(self) -> list[Handle]:
        """The deployment's processes, whoever started them; those that have ended may be among them, ``end`` set."""
        ...

    def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        """Every announcement of the process, the newest first to come; ends when the process is gone."""
        ...

    async def ask_to_stop(self, handle: Handle) -> None:
        """Ask for a graceful end."""
        ...

    async def kill(self, handle: Handle) -> None:
        """End it now with all its ranks, stopped (SIGSTOP) or not."""
        ...

    def logs_of(self, node: str) -> LogSource:
        """Where logs of that host, as its processes announce it, are read. Raises InvalidRequest for one that is not there."""
        ...

    async def save_state(self, text: str, key: str = STATE) -> None:
        """Keep a part of the controller's memory outside the controller, whole or not at all."""
        ...

    async def load_state(self, key: str = STATE) -> str | None: ...

    async def close(self) -> None:
        """Let go. What ``open`` started for this deployment ends here, survivors of the deployment too."""
        ...
