"""What a backend must do: start, watch, stop and kill the processes of one deployment, and find them again.

Two implementations: ``process_backend`` (plain processes on this host) and ``ray_backend`` (Ray actors). The supervisor
and the controller know only this protocol. A process is told apart by its name and its incarnation.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from biphase.cluster.deployment import Deployment
from biphase.protos.process import Announcement

Kind = Literal["prefill", "decode", "router", "controller"]
CONTROLLER: Literal["controller"] = "controller"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One life of one process: all it needs to start on any host."""

    name: str
    kind: Kind
    incarnation: int
    deployment: Deployment
    run_dir: str
    controller_address: str
    host: str = "127.0.0.1"
    """Where an instance listens; a backend of several hosts fills in the host's own address."""
    cpus: float = 0.0
    """CPUs it asks the placing backend for."""
    gpus: float | None = None
    """GPUs that its plan asks for; a backend that starts it fills in the share that it gets (0: none)."""
    env: tuple[tuple[str, str], ...] = ()
    """The BIPHASE_* variables of the user's shell."""

    @property
    def log_file(self) -> Path:
        return Path(self.run_dir) / "logs" / f"{self.name}-{self.incarnation}.log"

    def to_json(self) -> str:
        values = {**asdict(self), "deployment": self.deployment.to_json(), "env": dict(self.env)}
        return json.dumps(values)

    @staticmethod
    def from_json(text: str) -> "ProcessSpec":
        values = json.loads(text)
        values["deployment"] = Deployment.from_json(values["deployment"])
        values["env"] = tuple(values["env"].items())
        return ProcessSpec(**values)


class Handle(Protocol):
    """A process that was started or found again."""

    name: str
    kind: Kind
    incarnation: int
    pid: int
    """0 until known."""
    end: str | None
    """Why it ended, e.g. ``killed by SIGKILL``; None while it runs."""

    async def ended(self) -> str:
        """Wait until the process is gone and return why."""
        ...


class Backend(Protocol):
    """Starts and ends processes; decides nothing."""

    async def open(self) -> None:
        """Connect to what places processes. Raises SetupError."""
        ...

    async def check(self, specs: Sequence[ProcessSpec]) -> None:
        """Raise SetupError with both numbers, asked and there, when ``specs`` do not fit."""
        ...

    async def start(self, spec: ProcessSpec) -> Handle:
        """Start a process and return at once; its announcements tell the rest. Raises SetupError."""
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
        """End it now, stopped (SIGSTOP) or not."""
        ...

    async def save_state(self, text: str) -> None:
        """Keep the controller's state outside the controller."""
        ...

    async def load_state(self) -> str | None: ...

    async def close(self) -> None:
        """Let go. What ``open`` started for this deployment ends here, survivors of the deployment too."""
        ...
