"""A backend without processes, for tests of the controller's and the supervisor's shells: what it keeps, starts and kills."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from biphase.cluster.backend import STATE, Handle, Kind, NodeView, ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.deployment import Deployment
from biphase.cluster.local_logs import LocalLogs
from biphase.cluster.log_source import LogSource
from biphase.protos.process import Announcement, Announcer
from biphase.protos.values import Role


class FakeHandle:
    """A process that lives until ``die``. ``obeys``: a kill ends it; one on a host that is away does not end by it."""

    def __init__(self, name: str, kind: Kind, incarnation: int, *, obeys: bool = True) -> None:
        self.name, self.kind, self.incarnation, self.obeys = name, kind, incarnation, obeys
        self.end: str | None = None
        self.pid = 1
        self.pids: tuple[int, ...] = (1,)
        self.kills = 0
        self._gone = asyncio.Event()

    def die(self, end: str = "ended") -> None:
        self.end = end
        self._gone.set()

    async def ended(self) -> str:
        await self._gone.wait()
        return self.end or ""

    def __repr__(self) -> str:
        return f"<FakeHandle {self.name}#{self.incarnation}>"


class FakeBackend:
    """``refuses``: whether a text cannot be kept."""

    kill_patience_s: float | None = None
    hosts_may_join = False
    can_grow = False

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.refuses: Callable[[str], bool] = lambda text: False
        self.refused = 0
        self.living: list[Handle] = []
        self.started: list[ProcessSpec] = []
        self.began = asyncio.Event()

    async def open(self) -> None: ...

    async def own_address(self) -> str:
        return "127.0.0.1"

    async def nodes(self) -> list[NodeView]:
        return []

    async def idle(self, spec: ProcessSpec) -> int:
        return 0

    async def ask_node(self, spec: ProcessSpec) -> str:
        return ""

    async def withdraw_node(self, role: Role) -> None: ...

    async def node_came(self, spec: ProcessSpec) -> bool | None:
        return None

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None: ...

    async def check_nodes(self, deployment: Deployment) -> list[str]:
        return []

    def check_for(self, deployments: Sequence[Deployment]) -> None: ...

    def logs_of(self, node: str) -> LogSource:
        return LocalLogs()

    async def start(self, spec: ProcessSpec) -> FakeHandle:
        self.started.append(spec)
        self.began.set()
        handle = FakeHandle(spec.name, spec.kind, spec.incarnation)
        self.living.append(handle)
        return handle

    async def adopt(self) -> list[Handle]:
        return [handle for handle in self.living if handle.end is None]

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        await handle.ended()
        return
        yield  # an async generator that says nothing

    async def ask_to_stop(self, handle: Handle) -> None: ...

    async def kill(self, handle: Handle) -> None:
        assert isinstance(handle, FakeHandle)
        handle.kills += 1
        if handle.obeys:
            handle.die("killed")

    async def save_state(self, text: str, key: str = STATE) -> None:
        if self.refuses(text):
            self.refused += 1
            raise OSError(28, "No space left on device")
        self.kept[key] = text

    async def load_state(self, key: str = STATE) -> str | None:
        return self.kept.get(key)

    async def close(self) -> None: ...


def controller_over(backend: FakeBackend, run_dir: Path, deployment: Deployment) -> Controller:
    """The real controller over a backend without processes; nothing of it runs yet."""
    spec = ProcessSpec(
        name="controller",
        kind="controller",
        incarnation=1,
        deployment=deployment,
        run_dir=str(run_dir),
        controller_address="127.0.0.1:1",
    )
    word = Announcement(name="controller", kind="controller", incarnation=1, pid=1)
    return Controller(spec, backend, Announcer(word, lambda said: None))
