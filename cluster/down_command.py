"""`biphase down CLUSTER.yaml`: the end of what `ray up CLUSTER.yaml` began, from where that was run.

Drains and stops the deployment on the head, then `ray down`, then, for machines of your own, `ray stop` on each worker:
`ray down` alone leaves Ray running there.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from biphase.protos.errors import SetupError, one_line

NOTHING_RUNS = "no deployment"
"""Begins what `biphase stop` says where there is nothing to stop."""
SSH_S, CONNECT_S = 120.0, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """What of a cluster file says how to get at its machines."""

    path: Path
    name: str
    provider: str
    workers: tuple[str, ...] = ()
    """Of provider ``local``; those of a cloud end with their machines."""
    ssh: tuple[str, ...] = ()
    """The ssh command up to the host."""
    user: str = ""

    @staticmethod
    def read(path: Path) -> "ClusterFile":
        """Raises SetupError, one line."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
            raise SetupError(f"cannot read cluster file {path}: {reason}") from error
        except yaml.YAMLError as error:
            raise SetupError(f"{path}: not valid YAML: {one_line(error)}") from error
        try:
            return _cluster_file(path, values)
        except (KeyError, TypeError, AttributeError) as error:
            missing = f"key {error} is missing" if isinstance(error, KeyError) else "it is no mapping of keys"
            raise SetupError(f"{path}: {missing}; give the file that `ray up` was given") from error


def _cluster_file(path: Path, values: Any) -> ClusterFile:
    provider = values["provider"]
    auth: dict[str, Any] = values.get("auth") or {}
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    ssh += ["-o", "LogLevel=ERROR", "-o", f"ConnectTimeout={CONNECT_S}"]
    if auth.get("ssh_private_key"):
        ssh += ["-i", str(Path(auth["ssh_private_key"]).expanduser())]
    if auth.get("ssh_proxy_command"):
        ssh += ["-o", f"ProxyCommand={auth['ssh_proxy_command']}"]
    workers = tuple(provider.get("worker_ips") or ()) if provider["type"] == "local" else ()
    return ClusterFile(
        path=path,
        name=values["cluster_name"],
        provider=provider["type"],
        workers=workers,
        ssh=tuple(ssh),
        user=auth.get("ssh_user", ""),
    )


def down(arguments: argparse.Namespace) -> int:
    """Returns 0 when all of it has ended, 1 when `ray down` or a machine failed; what may go on running is named then."""
    cluster = ClusterFile.read(Path(arguments.cluster_file))
    ray = _ray()
    if not arguments.yes and not _confirmed(cluster):
        print("nothing was done", file=sys.stderr)
        return 1
    _stop_deployment(ray, cluster, arguments)
    _say(f"ending Ray: ray down {cluster.path}")
    ended = subprocess.run([ray, "down", "-y", str(cluster.path)], stdin=subprocess.DEVNULL, check=False)
    with ThreadPoolExecutor(max_workers=16) as pool:
        problems = [problem for problem in pool.map(lambda host: _stop_ray(cluster, host), cluster.workers) if problem]
    if ended.returncode != 0:
        what = "the head" if cluster.provider == "local" else "machines of the cluster"
        problems.insert(
            0, f"`ray down {cluster.path}` failed with {ended.returncode}, its words are above; {what} may go on"
        )
    for problem in problems:
        _say(problem)
    if not problems:
        print(f"down: {cluster.name}", flush=True)
    return 1 if problems else 0


def _stop_deployment(ray: str, cluster: ClusterFile, arguments: argparse.Namespace) -> None:
    """Drain and stop on the head. A head that is gone has nothing left to drain."""
    words = ["biphase", "stop"]
    words += ["--now"] if arguments.now else []
    words += ["--name", arguments.name] if arguments.name else []
    _say(f"stopping the deployment: {shlex.join(words)}")
    command = [ray, "exec", "--no-config-cache", str(cluster.path), shlex.join(words)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = next(
        (line for line in reversed((done.stdout + done.stderr).splitlines()) if line.startswith("biphase:")), ""
    )
    if done.returncode == 0:
        return
    if said and NOTHING_RUNS not in said:
        raise SetupError(f"on the head: {said.removeprefix('biphase: ')}")
    _say(said.removeprefix("biphase: ") or "the head does not answer, nothing could be drained")


def _stop_ray(cluster: ClusterFile, host: str) -> str:
    """End Ray on a worker; what went wrong, or nothing."""
    where = f"{cluster.user}@{host}" if cluster.user else host
    command = [*cluster.ssh, where, "bash --login -c 'ray stop --force'"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SSH_S
        )
    except subprocess.TimeoutExpired:
        return f"{host}: `ray stop` has not ended within {SSH_S:g} s; whatever runs there goes on"
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return f"{host}: Ray could not be ended there ({said}); whatever runs there goes on"


def _ray() -> str:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        raise SetupError("no `ray` command here; `biphase down` runs where `ray up` was run")
    return found


def _confirmed(cluster: ClusterFile) -> bool:
    if not sys.stdin.isatty():
        raise SetupError("give -y: there is no terminal to ask at")
    return input(f"End the deployment and the cluster {cluster.name}? [y/N] ").strip().lower() in ("y", "yes")


def _say(line: str) -> None:
    print(f"biphase: {line}", file=sys.stderr, flush=True)
