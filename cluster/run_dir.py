"""The run directory of a deployment: who serves it, its logs, its records. Files only, no processes.

``BIPHASE_RUN_DIR`` (default ``~/.local/state/biphase``) holds one folder per deployment name:

    lock             held (flock) by the supervisor as long as it lives
    serve.json       the supervisor's word on the deployment: ServeRecord
    deployment.json  what is served: what was asked for, and what updates have brought since
    state.json       the controller's memory (process backend)
    events/          what has happened, in files of a hundred; kept over serves (process backend)
    processes/       a record, a spec and an announcement per process (process backend)
    logs/            <process>-<incarnation>.log (ranks above 0 of an instance: .rank<k>.log); the previous serve's logs
                     are in logs.previous/
"""

import fcntl
import json
import os
import shutil
import signal
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from biphase.cluster.deployment import Deployment
from biphase.protos.errors import SetupError

CUT_SIGNAL = signal.SIGUSR1
"""Ends a supervisor at once; SIGINT and SIGTERM let running requests end first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLine:
    """What people see of one process."""

    name: str
    kind: str
    incarnation: int
    state: str
    detail: str
    progress: float
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRecord:
    """``state``: starting, ready, degraded, stopping, stopped or failed (then ``detail`` says why)."""

    name: str
    pid: int
    started_ticks: int
    backend: str
    state: str = "starting"
    detail: str = ""
    controller_address: str = ""
    router_address: str = ""
    stages: tuple[tuple[str, float], ...] = ()
    """(what was reached, seconds since `biphase serve` began), in order."""
    processes: tuple[ProcessLine, ...] = ()

    @staticmethod
    def from_json(text: str) -> "ServeRecord":
        values = json.loads(text)
        stages = tuple((name, at_s) for name, at_s in values.pop("stages"))
        processes = tuple(ProcessLine(**line) for line in values.pop("processes"))
        return ServeRecord(**values, stages=stages, processes=processes)


def base_dir() -> Path:
    """Where the run directories of all deployments are."""
    given = os.environ.get("BIPHASE_RUN_DIR")
    if given:
        return Path(given).absolute()
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "biphase"


def started_ticks(pid: int) -> int | None:
    """When ``pid`` was started, in clock ticks since boot; None when it does not run (a zombie does not).

    A pid and this number together name a process for good, a pid alone may have been given away again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


class RunDir:
    """The files of one deployment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def of(name: str) -> "RunDir":
        return RunDir(base_dir() / name)

    @property
    def deployment_file(self) -> Path:
        return self.path / "deployment.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    def kept_file(self, key: str) -> Path:
        """Of one part of the controller's memory."""
        return self.state_file if key == "state" else self.path / f"{key}.json"

    @property
    def processes(self) -> Path:
        return self.path / "processes"

    def process_file(self, name: str, incarnation: int, rank: int, what: str = "") -> Path:
        """The file of one rank of one life: its record, or its "spec" or "announce"."""
        parts = (f"{name}-{incarnation}", f"rank{rank}" if rank else "", what, "json")
        return self.processes / ".".join(part for part in parts if part)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def supervisor_log(self) -> Path:
        return self.logs / "supervisor.log"

    def lock(self) -> int:
        """Take the deployment's lock and return its descriptor. Raises SetupError that names who has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SetupError(f"cannot use run directory {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            record = self.record()
            who = f"pid {record.pid}" if record else "another process"
            raise SetupError(
                f"deployment {self.path.name} is already served by {who}: `biphase stop --name {self.path.name}` ends it, "
                "or give this one another --name"
            ) from error
        return descriptor

    def is_served(self) -> bool:
        """Whether a supervisor lives."""
        try:
            os.close(self.lock())
        except SetupError:
            return (self.path / "lock").exists()
        return False

    def prepare(self, deployment: Deployment, *, keep_logs: bool = False) -> None:
        """Make room for a new life of the deployment; the last one's logs stay as logs.previous, unless its processes may
        still write to them (``keep_logs``). The records of processes are the backend's to clear. Hold the lock."""
        if self.logs.exists() and not keep_logs:
            shutil.rmtree(self.path / "logs.previous", ignore_errors=True)
            self.logs.rename(self.path / "logs.previous")
        for old in (self.state_file, self.path / "serve.json"):
            old.unlink(missing_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.note_deployment(deployment)

    def note_deployment(self, deployment: Deployment) -> None:
        replace_file(self.deployment_file, deployment.to_json())

    def deployment(self) -> Deployment:
        return Deployment.from_json(self.deployment_file.read_text())

    def record(self) -> ServeRecord | None:
        """The supervisor's last word, from whichever life; None when there is none."""
        try:
            return ServeRecord.from_json((self.path / "serve.json").read_text())
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @property
    def ended_in_order(self) -> bool:
        """Whether the last supervisor ended everything before it ended itself."""
        record = self.record()
        return record is None or record.state in ("stopped", "failed")

    def write_record(self, record: ServeRecord) -> None:
        replace_file(self.path / "serve.json", json.dumps(asdict(record)))


def served() -> list[RunDir]:
    """The deployments that have a living supervisor."""
    base = base_dir()
    if not base.is_dir():
        return []
    found = [RunDir(path) for path in sorted(base.iterdir()) if (path / "lock").exists()]
    return [run_dir for run_dir in found if run_dir.is_served()]
