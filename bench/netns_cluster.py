"""A deployment whose processes have hosts of their own: network namespaces, under the `process` backend. For benches.

`biphase serve` runs as always, on the controller's host; ``netns_site`` on its PYTHONPATH moves each process that it starts to
a host. Routers and controller keep theirs for all their lives; an instance's next life begins on a free host, so that it is
out of a cut's reach as on another machine. Faults are real: signals by pid, packets dropped at the bridge. What the controller
cannot reach it cannot kill either: it gives it up, and a life that comes back to the network is a former one.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml
from idle_counters import counters_at

from biphase.cluster.run_dir import RunDir
from biphase.protos import controller_pb2, controller_pb2_grpc
from biphase.protos.grpc_setup import channel_options

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support.netns import Network, network

SITE = Path(__file__).resolve().parent / "netns_site"
sys.path.append(str(SITE))
from host_plan import HostPlan, changing_plan, is_alive, read_plan, write_plan

CONTROLLER, CONTROLLER_HOST = "controller", "c"
FIRST_PORT = 8700
START_S, STOP_S = 180.0, 60.0
NAME = "netns"


class NetnsCluster:
    """One deployment on ``net``. Owns its plan of hosts and its `biphase serve`."""

    def __init__(
        self, net: Network, folder: Path, deploy: Mapping[str, Any], num_routers: int, env: Mapping[str, str]
    ) -> None:
        self.net, self.folder, self.num_routers = net, folder, num_routers
        self._deploy, self._env = dict(deploy), dict(env)
        self._plan_file = folder / "hosts.json"
        self._serve: subprocess.Popen[str] | None = None
        self.run_dir = RunDir(folder / "run" / NAME)

    @property
    def addresses(self) -> list[str]:
        """Of the routers, in their order."""
        return [f"{self.net.address(f'r{index}')}:{FIRST_PORT + index}" for index in range(self.num_routers)]

    def start(self) -> None:
        """Return when all is ready; RuntimeError with the logs when that is not so in time."""
        self._write_plan()
        deploy = {"backend": "process", "name": NAME, "host": "0.0.0.0", "port": FIRST_PORT, **self._deploy}
        deploy["routers"] = [
            {"name": f"router-{index}", "host": "0.0.0.0", "port": FIRST_PORT + index}
            for index in range(self.num_routers)
        ]
        (self.folder / "deploy.yaml").write_text(yaml.safe_dump(deploy))
        own = {"BIPHASE_RUN_DIR": str(self.folder / "run"), "BIPHASE_NETNS": str(self._plan_file)}
        env = {**os.environ, **self._env, **own}
        env["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "biphase.cluster.cli", "serve", str(self.folder / "deploy.yaml")]
        with open(self.folder / "serve.err", "w") as errors:
            self._serve = subprocess.Popen(
                self.net.command(CONTROLLER_HOST, command), env=env, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self._serve.stdout is not None
        readable, _, _ = select.select([self._serve.stdout], [], [], START_S)
        line = self._serve.stdout.readline() if readable else ""
        if not line.startswith("ready: "):
            self.stop()
            raise RuntimeError(f"the deployment did not start: {line}\n{self.logs()}")

    def stop(self) -> None:
        """Heal everything and end every process, stopped ones too."""
        self.net.heal_all()
        if self._serve is not None:
            for pid in self._all_pids():
                _signal(pid, signal.SIGCONT)
            for _ in range(2):  # the second asks for an end at once
                self._serve.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._serve.wait(0.5)
            try:
                self._serve.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._serve.kill()
            self._serve.communicate()
            self._serve = None
        for pid in self._all_pids():  # whom a broken supervisor has left
            _signal(pid, signal.SIGKILL)

    def logs(self) -> str:
        files = [self.folder / "serve.err", *sorted(self.run_dir.logs.glob("*"))]
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in files if path.exists())

    # -- who is where

    def _write_plan(self) -> None:
        fixed = {CONTROLLER: CONTROLLER_HOST} | {f"router-{index}": f"r{index}" for index in range(self.num_routers)}
        hosts = {
            host: {"address": self.net.address(host), "namespace": self.net.namespace(host)} for host in self.net.hosts
        }
        spare = [host for host in hosts if host.startswith("r") and host not in fixed.values()]
        write_plan(self._plan_file, HostPlan({"hosts": hosts, "fixed": fixed, "spare": spare}))

    def _note_cut(self, host: str, cut: bool) -> None:
        with changing_plan(self._plan_file) as plan:
            plan.note_cut(host, cut)

    def lives(self) -> dict[str, tuple[str, int, int]]:
        """(host, incarnation, pid) of the newest living life of every process, by its name."""
        found: dict[str, tuple[str, int, int]] = read_plan(self._plan_file).newest(is_alive)
        return found

    def former_lives(self) -> list[str]:
        """Those that still run though a newer one of their name does."""
        found: list[str] = read_plan(self._plan_file).former(is_alive)
        return found

    def _all_pids(self) -> list[int]:
        lives = read_plan(self._plan_file).lives if self._plan_file.exists() else []
        return [life[3] for life in lives if is_alive(life[3], life[4])]

    def pids(self) -> dict[str, int]:
        return {name: pid for name, (_, _, pid) in self.lives().items()}

    def host_of(self, name: str) -> str:
        lives = self.lives()
        if name not in lives:
            raise RuntimeError(f"{name} does not run; there are {', '.join(sorted(lives))}")
        return lives[name][0]

    # -- faults

    def kill(self, name: str) -> None:
        _signal(self.pids()[name], signal.SIGKILL)

    def pause(self, name: str) -> int:
        """SIGSTOP; returns the pid, for ``resume``."""
        pid = self.pids()[name]
        _signal(pid, signal.SIGSTOP)
        return pid

    def resume(self, pid: int) -> None:
        """SIGCONT, unless it has been killed meanwhile."""
        _signal(pid, signal.SIGCONT)

    def cut(self, name: str) -> str:
        """Take the process's host off the network; returns the host, for ``heal``."""
        host = self.host_of(name)
        self._note_cut(host, True)
        self.net.cut(host)
        return host

    def heal(self, host: str) -> None:
        self.net.heal(host)
        self._note_cut(host, False)

    def cut_pair(self, one: str, other: str) -> tuple[str, str]:
        hosts = self.host_of(one), self.host_of(other)
        self.net.cut_pair(*hosts)
        return hosts

    def heal_pair(self, hosts: tuple[str, str]) -> None:
        self.net.heal_pair(*hosts)

    # -- what it says of itself

    async def status(self, timeout_s: float = 2.0) -> controller_pb2.ClusterStatus | None:
        """The controller's; None when it does not answer."""
        record = self.run_dir.record()
        port = record.controller_address.rpartition(":")[2] if record else "1"
        address = f"{self.net.address(CONTROLLER_HOST)}:{port}"
        async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
            try:
                stub = controller_pb2_grpc.ControllerStub(channel)
                return await stub.GetStatus(controller_pb2.WatchStatusRequest(), timeout=timeout_s)  # type: ignore[no-any-return]
            except grpc.aio.AioRpcError:
                return None

    async def worker_addresses(self) -> dict[str, str]:
        """Of every instance that the controller calls ready. It asks all routers for its answer: a stopped one costs a second."""
        status = await self.status()
        return {
            process.name: process.address
            for process in (status.processes if status else ())
            if process.kind in ("prefill", "decode") and process.state == "ready"
        }

    async def worker_counters(self) -> dict[str, dict[str, int]]:
        """Of every instance that the controller calls ready; one that does not answer has none."""
        return {name: await counters_at(address) for name, address in (await self.worker_addresses()).items()}


def hosts_for(num_instances: int, num_routers: int, spares: int) -> list[str]:
    return [
        CONTROLLER_HOST,
        *(f"r{index}" for index in range(num_routers)),
        *(f"n{index}" for index in range(num_instances + spares)),
    ]


@contextlib.asynccontextmanager
async def netns_cluster(
    folder: Path,
    deploy: Mapping[str, Any],
    *,
    num_instances: int,
    num_routers: int = 2,
    spares: int = 3,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[NetnsCluster]:
    """A deployment for a while, with more of ``env`` (``cpu_shares.py``) in its processes'. Nothing of it is left afterwards: no process, no namespace, no device."""
    with network(hosts_for(num_instances, num_routers, spares)) as net:
        cluster = NetnsCluster(net, folder, deploy, num_routers, env or {})
        try:
            await asyncio.to_thread(cluster.start)
            yield cluster
        finally:
            await asyncio.to_thread(cluster.stop)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
